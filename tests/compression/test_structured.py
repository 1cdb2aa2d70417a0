"""Heads, neurons and layers: pruned models compute the same after they have shrunk, and load again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pruning is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the models are those of transformers")

import espalier  # noqa: E402
from espalier.compression import costs as module  # noqa: E402
from espalier.compression.config import Config  # noqa: E402
from espalier.compression.costs import Costs  # noqa: E402
from espalier.compression.groups import parse_pattern  # noqa: E402
from espalier.compression.pruner import Pruner  # noqa: E402
from espalier.compression.structured import Stack, is_skipped  # noqa: E402
from espalier.errors import ConfigError  # noqa: E402

SMALL: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24},
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24},
    "electra": {
        "hidden_size": 16,
        "embedding_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 24,
    },
    "mpnet": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24},
}


def encoder(family: str = "bert") -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=50, max_position_embeddings=40, **SMALL[family])
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:
                parameter.normal_(0, 0.3)
    return model


def inputs() -> dict[str, Any]:
    ids = torch.randint(5, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(**inputs()).last_hidden_state


def loss(model: Any, batch: Any) -> Any:
    hidden = model(**batch).last_hidden_state
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    return (hidden * noise).sum((1, 2)).mean()


def batches() -> list[Any]:
    return [inputs()]


def pruned(model: Any, pattern: str, sparsity: float, **settings: Any) -> Pruner:
    pruner = Pruner(model, Config(sparsity=sparsity, pattern=pattern, **settings))
    pruner.prune(sparsity, batches, loss)
    return pruner


def loads_again(model: Any, folder: Path) -> None:
    """transformers and the engine read the folder, and agree with the model in memory."""
    model.save_pretrained(folder)
    again = transformers.AutoModel.from_pretrained(folder)
    torch.testing.assert_close(output(again), output(model))
    session = espalier.load(folder, threads=1, tune=False)
    feeds = {name: value.numpy() for name, value in inputs().items()}
    names = {info.name for info in session.get_inputs()}
    feeds |= {"token_type_ids": np.zeros((3, 9), np.int64)} if "token_type_ids" in names else {}
    found = session.run(None, {name: value for name, value in feeds.items() if name in names})[0]
    keep = inputs()["attention_mask"].bool().numpy()
    np.testing.assert_allclose(found[keep], output(model).numpy()[keep], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", list(SMALL))
def test_neurons_go_and_the_model_is_smaller(family: str, tmp_path: Path) -> None:
    model = encoder(family)
    pruner = pruned(model, "neurons", 0.5)
    assert pruner.sparsity() == pytest.approx(0.5)
    before = output(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert pruner.shrink() is model
    torch.testing.assert_close(output(model), before)
    stack = Stack.of(model)
    assert getattr(model.config, stack.setting("intermediate_size")) == 12
    assert sum(p.numel() for p in model.parameters()) == parameters - 3 * (12 * 33)
    assert pruner.sparsity() == 0
    pruner.enforce()
    loads_again(model, tmp_path)


def test_layers_that_keep_fewer_neurons_are_filled_up_with_zeros(tmp_path: Path) -> None:
    model = encoder()
    with torch.no_grad():  # a layer whose neurons matter little, so that one threshold takes more of them
        model.encoder.layer[1].output.dense.weight[:, 3:] *= 1e-3
    pruner = pruned(model, "neurons", 0.4, score="magnitude", allocation="global")
    alive = [int(pruner.masks[f"encoder.layer.{i}.output.dense"].any(0).sum()) for i in range(3)]
    assert len(set(alive)) > 1
    before = output(model)
    pruner.shrink()
    torch.testing.assert_close(output(model), before)
    assert model.config.intermediate_size == max(alive)
    assert [int(model.encoder.layer[i].output.dense.weight.any(0).sum()) for i in range(3)] == alive
    loads_again(model, tmp_path)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt", "obert"])
def test_heads_go_with_their_queries_keys_and_values(family: str, score: str, tmp_path: Path) -> None:
    model = encoder(family)
    pruner = pruned(model, "heads", 0.5, score=score)
    assert pruner.sparsity() == pytest.approx(0.5)
    stack = Stack.of(model)
    names = stack.names().names
    for index in range(3):
        _, mix = stack.part(index, names.mix)
        columns = mix.weight.detach().reshape(16, 4, 4).any(2).any(0)
        assert int(columns.sum()) == 2
        for part in (names.query, names.key, names.value):
            _, linear = stack.part(index, part)
            assert torch.equal(linear.weight.detach().reshape(4, 4, 16).any(2).any(1), columns)
    before = output(model)
    pruner.shrink()  # a Hugging Face folder cannot say so: they stay as zeros
    torch.testing.assert_close(output(model), before)
    loads_again(model, tmp_path)


def test_second_order_prunes_neurons_better_than_magnitude() -> None:
    dense = output(encoder())
    found = {}
    for score in ("magnitude", "sparsegpt"):
        model = encoder()
        pruned(model, "neurons", 0.5, score=score)
        found[score] = float(((output(model) - dense) ** 2).mean())
    assert found["sparsegpt"] < found["magnitude"]


@pytest.mark.parametrize("family", list(SMALL))
def test_layers_go_and_the_others_move_up(family: str, tmp_path: Path) -> None:
    model = encoder(family)
    pruner = pruned(model, "layers", 0.4)
    stack = Stack.of(model)
    skipped = [is_skipped(layer) for layer in stack.layers]
    assert sum(skipped) == 1
    assert pruner.sparsity() == pytest.approx(1 / 3)
    before = output(model)
    kept = [layer for layer, gone in zip(stack.layers, skipped, strict=True) if not gone]
    pruner.shrink()
    torch.testing.assert_close(output(model), before)
    assert list(Stack.of(model).layers) == kept
    assert getattr(model.config, stack.setting("num_hidden_layers")) == 2
    assert pruner.sparsity() == 0
    assert set(pruner.masks) == set(pruner.layers)
    loads_again(model, tmp_path)


def test_the_layer_that_does_least_is_skipped() -> None:
    model = encoder()
    with torch.no_grad():
        for linear in (model.encoder.layer[1].attention.output.dense, model.encoder.layer[1].output.dense):
            linear.weight.zero_()
            linear.bias.zero_()
    pruned(model, "layers", 0.34)
    assert [is_skipped(layer) for layer in model.encoder.layer] == [False, True, False]


def test_skipped_layers_survive_a_checkpoint() -> None:
    model = encoder()
    pruner = pruned(model, "layers", 0.4)
    again = encoder()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    other = Pruner(again, Config(sparsity=0.4, pattern="layers"))
    other.load_state_dict(pruner.state_dict())
    torch.testing.assert_close(output(again), output(model))


def test_gradients_flow_past_a_skipped_layer() -> None:
    model = encoder()
    pruned(model, "layers", 0.4)
    loss(model, inputs()).backward()
    found = [any(p.grad is not None for p in layer.parameters()) for layer in model.encoder.layer]
    assert found == [not is_skipped(layer) for layer in model.encoder.layer]


def test_a_structure_that_is_excluded_in_part_is_left_alone() -> None:
    model = encoder()
    pruner = Pruner(model, Config(sparsity=0.5, pattern="neurons", exclude=(r"layer\.0\.",)))
    assert sorted(pruner.layers) == [
        f"encoder.layer.{i}.{part}.dense" for i in (1, 2) for part in ("intermediate", "output")
    ]
    with pytest.raises(ConfigError, match="no encoder layer has all of its heads"):
        Pruner(model, Config(sparsity=0.5, pattern="heads", exclude=("query",)))


class Made(Costs):
    """Costs without a clock: a layer's time is its size times what is left."""

    def __init__(self) -> None:
        pass

    def linear(self, shape: tuple[int, int], sparsity: float, groups: Any) -> float:
        return shape[0] * shape[1] * (1 - sparsity)

    def rest(self, model: Any, linear: Any, lengths: Any) -> tuple[float, str]:
        return 1000.0, ""


@pytest.mark.parametrize("pattern", ["layers", "neurons", "heads"])
def test_a_speed_up_by_structure(pattern: str) -> None:
    pruner = Pruner(encoder(), Config(speedup=1.4, pattern=pattern), costs=Made())
    report = pruner.prune(pruner.target, batches, loss)
    assert 0.2 < report.sparsity < 0.8
    assert report.speedup is not None
    assert report.speedup >= 1.4


def test_the_rest_of_a_model_is_what_two_measurements_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer." in name}
    costs = Costs(cache=tmp_path / "costs.json")
    seconds, note = costs.rest(model, linear)  # really measured; so small a model may not show its zeros
    assert seconds >= 0
    assert not note or "linear layers alone" in note

    def dense(sparsity: float) -> float:
        return sum(
            costs.linear((m.out_features, m.in_features), sparsity, parse_pattern("4x1")) for m in linear.values()
        )

    # Twice as slow inside of a model, and a rest of 3 dense layers' time.
    monkeypatch.setattr(module, "_time_model", lambda _, __, sparsity, ___: 2 * (dense(sparsity) + 3 * dense(0.0)))
    fresh = Costs(cache=tmp_path / "other.json")
    fresh._known.update({key: value for key, value in costs._known.items() if " at " not in key})
    assert fresh.rest(model, linear) == (pytest.approx(3 * dense(0.0)), "")
    monkeypatch.undo()
    assert Costs(cache=tmp_path / "other.json").rest(model, linear) == (pytest.approx(3 * dense(0.0)), "")
    nothing, why = costs.rest(torch.nn.Linear(2, 2), {})
    assert nothing == 0
    assert "linear layers alone" in why
