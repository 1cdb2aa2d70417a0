"""Walking through a stack layer by layer gives what running the whole model gives."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pruning is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the models are those of transformers")

from espalier.compression.calibration import feed  # noqa: E402
from espalier.compression.structured import Stack  # noqa: E402
from espalier.compression.walk import in_turn, record  # noqa: E402

FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "mpnet": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
}


def encoder(family: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=50, max_position_embeddings=40, **FAMILIES[family])
    return transformers.AutoModel.from_config(config).eval()


def batches() -> list[dict[str, Any]]:
    ids = torch.randint(5, 50, (2, 3, 9), generator=torch.Generator().manual_seed(0))
    masks = torch.ones_like(ids)
    masks[0, 1, 6:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


def loss(model: Any, batch: Any) -> Any:
    return model(**batch).last_hidden_state.sum()


def gather(model: Any, modules: dict[str, Any], given: Any, by: Any) -> dict[str, Any]:
    found: dict[str, list[Any]] = {name: [] for name in modules}
    feed(model, modules, given, by, lambda name, x: found[name].append(x.clone()))
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_layer_gets_what_the_pruned_ones_before_give(family: str) -> None:
    model = encoder(family)
    stack = Stack.of(model)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(stack.name)}
    seen: list[str] = []
    for stage in in_turn(model, (stack.name, stack.layers), linear, batches, loss):
        assert stage.model is not model
        modules = {name: linear[name] for name in stage.names}
        here = gather(stage.model, modules, stage.batches(), stage.loss)
        whole = gather(model, modules, batches(), loss)
        for name in stage.names:
            torch.testing.assert_close(here[name], whole[name])
            assert len(here[name]) == 27 * 2 - 3  # without padding
            with torch.no_grad():
                linear[name].weight[::2] = 0
        seen += stage.names
    assert sorted(seen) == sorted(linear)
    assert len({id(stage) for stage in seen}) > 2


def test_what_lies_outside_of_the_stack_comes_last() -> None:
    model = encoder("bert")
    stack = Stack.of(model)
    linear = {"encoder.layer.1.output.dense": model.encoder.layer[1].output.dense, "pooler.dense": model.pooler.dense}

    def with_pooler(m: Any, batch: Any) -> Any:
        return m(**batch).pooler_output.sum()

    found = list(in_turn(model, (stack.name, stack.layers), linear, batches, with_pooler))
    assert [stage.names for stage in found] == [["encoder.layer.1.output.dense"], ["pooler.dense"]]
    assert found[1].model is model


class Crossed(torch.nn.Module):
    """Layers that are a list but no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: Any) -> Any:
        return self.layers[0](x) + self.layers[1](x)


def test_layers_that_are_no_chain_are_run_with_the_whole_model() -> None:
    model = Crossed()
    data = [torch.randn(3, 4)]
    by = lambda m, x: m(x).sum()  # noqa: E731
    assert record(model, model.layers, data, by) is None
    linear = {"layers.0.0": model.layers[0][0], "layers.1.0": model.layers[1][0]}
    found = list(in_turn(model, ("layers", model.layers), linear, lambda: data, by))
    assert [stage.model is model for stage in found] == [True]
    assert found[0].names == ["layers.0.0", "layers.1.0"]
