"""The models being served."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

from espalier.errors import InputNameError, UnknownModelError
from espalier.loading import LoadSettings
from espalier.pipelines import Embeddings, Pipeline, QuestionAnswering, TextClassification, TokenClassification, choose
from espalier.session import Session

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
TASKS: dict[type[Pipeline], str] = {
    Embeddings: "embeddings",
    QuestionAnswering: "question-answering",
    TextClassification: "classification",
    TokenClassification: "token-classification",
}


class Model:
    """A loaded model under a name. ``version`` counts how often the name was loaded.

    ``pipeline`` is None where the model does none of the tasks or has no tokenizer: it then takes tensors only.
    """

    def __init__(self, name: str, version: int, path: Path, session: Session) -> None:
        self.name = name
        self.version = str(version)
        self.path = path
        self.session = session
        self.inputs = session.get_inputs()
        self.outputs = session.get_outputs()
        self.output_names = tuple(info.name for info in self.outputs)
        self.pipeline = choose(session, path if path.is_dir() else path.parent)

    @property
    def task(self) -> str | None:
        """What it does with texts."""
        return TASKS.get(type(self.pipeline)) if self.pipeline is not None else None


class Models:
    """Models by name. Looking up is for one thread, :meth:`load` may run in another."""

    def __init__(self, settings: LoadSettings, *, folder: Path | None = None, batch_tokens: int | None = None) -> None:
        """``settings``: of every model that is loaded. ``folder``: of those that clients may load.

        ``batch_tokens``: of the largest batch to come.
        """
        self.folder = folder
        self._settings = settings
        self._batch_tokens = batch_tokens
        self._models: dict[str, Model] = {}
        self._versions: dict[str, int] = {}
        self._loading = threading.Lock()

    def __iter__(self) -> Iterator[Model]:
        return iter(list(self._models.values()))

    def __len__(self) -> int:
        return len(self._models)

    def get(self, name: str, version: str = "") -> Model:
        """The model of that name. Raises UnknownModelError, which lists the names, or the version there is."""
        model = self._models.get(name)
        if model is None:
            known = ", ".join(sorted(self._models)) or "none"
            raise UnknownModelError(f"no model {name[:128]!r} is served here; served: {known}")
        if version and version != model.version:
            raise UnknownModelError(f"model {name!r} is served as version {model.version}, not {version[:32]!r}")
        return model

    def for_task(self, name: str | None, kind: type[Pipeline]) -> Model:
        """The model of that name, or for None the only one that does the task.

        Raises UnknownModelError, and InputNameError when the model does another task or several do.
        """
        if name is not None:
            model = self.get(name)
            if not isinstance(model.pipeline, kind):
                does = (
                    f"does {model.task}" if model.task else "takes tensors only: it has no tokenizer, or no such task"
                )
                raise InputNameError(f"model {name!r} {does}; expected one that does {TASKS[kind]}")
            return model
        able = [model for model in self if isinstance(model.pipeline, kind)]
        if len(able) != 1:
            names = ", ".join(model.name for model in able) or "none"
            raise InputNameError(f'which model? Name one that does {TASKS[kind]} as "model"; there is: {names}')
        return able[0]

    def load(self, name: str, path: Path) -> Model:
        """Load a model, or load it anew; requests go to the old one until the new one is there, and warm.

        Raises InputNameError for a name that cannot stand in an address, and what loading raises.
        """
        if not _NAME.fullmatch(name):
            raise InputNameError(
                f"a model cannot be called {name[:128]!r}; use letters, digits, '.', '_' and '-', beginning with a "
                "letter or digit: NAME=PATH"
            )
        with self._loading:
            version = self._versions.get(name, 0) + 1
            session = self._settings.open(path)
            session.warm_up(tokens=self._batch_tokens)
            model = Model(name, version, path, session)
            self._versions[name] = version
            self._models[name] = model
        return model

    def unload(self, name: str) -> Model:
        """Take a model away; what it is answering is answered. Raises UnknownModelError."""
        model = self.get(name)
        del self._models[name]
        return model

    def available(self) -> dict[str, Path]:
        """What may be loaded by name: the models in the folder."""
        if self.folder is None:
            return {}
        return {
            path.name if path.is_dir() else path.stem: path
            for path in sorted(self.folder.iterdir())
            if path.is_dir() or path.suffix in (".onnx", ".espalier")
        }


def name_of(path: Path) -> str:
    """The name a model gets when it is given none: its file's or folder's."""
    resolved = path.resolve()
    return resolved.name if resolved.is_dir() else resolved.stem
