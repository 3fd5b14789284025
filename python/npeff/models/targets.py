"""Load MODEL and DATA of the command line: ``package.module:callable``, ``path/to/file.py:callable``, ``hf:PATH``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from npeff.errors import ArgumentError, DataError, ModelError, NpeffError, Terminated
from npeff.language import hugging_face

if TYPE_CHECKING:
    from torch import nn

FORMS = "expected package.module:callable or path/to/file.py:callable"


def load_object(target: str, name: str = "target") -> Any:
    """Import what a target names, without calling it.

    Args:
        target: ``package.module:attribute`` or ``file.py:attribute``; the attribute may be dotted
            (``Class.method``). Modules are looked up beside the current directory too; a file may import its
            neighbours.
        name: What the target is, for messages: ``MODEL``, ``DATA``.

    Returns:
        The attribute.

    Raises:
        ArgumentError: The target is malformed, or the file, the module or the attribute does not exist,
            or importing it raised.
    """
    source, colon, attribute = target.rpartition(":")
    if not (source and colon and attribute):
        raise ArgumentError(f"{name}: {FORMS}, got {target!r}{_instead(target)}")
    module = _load_file(Path(source), name) if _is_path(source) else _load_module(source, name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            owner = source if found is module else f"{source}:{getattr(found, '__name__', type(found).__name__)}"
            raise ArgumentError(f"{name}: {owner} has no {part!r}{_close(part, found)}")
        found = getattr(found, part)
    return found


def load_model(target: str) -> nn.Module:
    """Load the model that MODEL names: a module, what a callable without arguments returns, or ``hf:PATH``.

    Args:
        target: See :func:`load_object`; with ``hf:``, :func:`npeff.language.hugging_face.load_model`.

    Returns:
        The module, as the callable made it.

    Raises:
        ArgumentError: The target cannot be imported, or is not callable.
        ModelError: The callable raised, or returned something else.
    """
    from torch import nn

    if target.startswith(hugging_face.PREFIX):
        return hugging_face.load_model(target)
    found = load_object(target, "MODEL")
    if isinstance(found, nn.Module):
        return found
    model = _call(found, target, "MODEL", ModelError)
    if not isinstance(model, nn.Module):
        raise ModelError(f"MODEL: {target} returned {_kind(model)}, expected a torch.nn.Module")
    return model


def load_data(target: str) -> Iterable[Any]:
    """Load the data that DATA names: an iterable of batches, or what a callable without arguments returns.

    Args:
        target: See :func:`load_object`.

    Returns:
        The iterable; each batch is ``(inputs, labels)``, a dict or a tensor.

    Raises:
        ArgumentError: The target cannot be imported, or is neither callable nor iterable.
        DataError: The callable raised, or returned something that holds no batches.
    """
    import torch

    found = load_object(target, "DATA")
    data = _call(found, target, "DATA", DataError) if callable(found) else found
    if isinstance(data, torch.Tensor | str | bytes | dict):
        raise DataError(
            f"DATA: {target} gave {_kind(data)}, which is one batch at most; expected an iterable of "
            "batches: a DataLoader, a list, a generator — for a single batch, return [batch]"
        )
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise DataError(
            f"DATA: {target} returned {_kind(data)}, expected an iterable of batches: a DataLoader, a list, a generator"
        )
    return cast("Iterable[Any]", data)


def load_made(target: str, name: str) -> Any:
    """Call what a target names, without arguments.

    Args:
        target: See :func:`load_object`.
        name: What the target is, for messages.

    Raises:
        ArgumentError: The target cannot be imported, is not callable, or raised.
    """
    return _call(load_object(target, name), target, name, ArgumentError)


def _is_path(source: str) -> bool:
    return source.endswith(".py") or "/" in source or "\\" in source


def _load_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        what = "is a folder, not a Python file" if path.is_dir() else "does not exist"
        where = f" (current directory: {Path.cwd()})" if not path.is_absolute() else ""
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3, cutoff=0.5)
        raise ArgumentError(f"{name}: file {path} {what}{where}{_did_you_mean(near)}")
    path = path.resolve()
    # Named after the whole path: two files of one name do not meet. Kept: MODEL and DATA share state.
    key = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"{name}: {path} cannot be imported as Python; {FORMS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        with _import_errors(str(path), name), _importable(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _load_module(source: str, name: str) -> ModuleType:
    with _importable(Path.cwd()):
        try:
            with _import_errors(source, name):
                return importlib.import_module(source)
        except ModuleNotFoundError as error:
            near = [p.stem for p in Path.cwd().glob("*.py")] + sorted(sys.modules)
            hint = _did_you_mean(difflib.get_close_matches(source, near, n=3, cutoff=0.7))
            looked = "looked in the current directory and on sys.path"
            message = f"{name}: there is no module {error.name!r} ({looked}){hint}"
            raise ArgumentError(message) from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules of ``folder`` be imported, now and later (models import lazily)."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    yield


@contextmanager
def _import_errors(source: str, name: str) -> Iterator[None]:
    try:
        yield
    except (NpeffError, Terminated):
        raise
    except ModuleNotFoundError as error:
        if error.name and (source == error.name or source.startswith(f"{error.name}.")):
            raise
        raise ArgumentError(f"{name}: importing {source} raised {_describe(error)}") from error
    except (Exception, SystemExit) as error:
        raise ArgumentError(f"{name}: importing {source} raised {_describe(error)}") from error


def _call(found: Any, target: str, name: str, kind: type[NpeffError]) -> Any:
    if not callable(found):
        raise ArgumentError(f"{name}: {target} is {_kind(found)}, expected something to call without arguments")
    try:
        return found()
    except (NpeffError, Terminated):
        raise
    except (Exception, SystemExit) as error:
        depth = len(traceback.extract_tb(error.__traceback__))
        if isinstance(error, TypeError) and depth == 1:  # raised by the call itself, not inside
            raise ArgumentError(f"{name}: {target} must be callable without arguments: {error}") from error
        raise kind(f"{name}: {target}() raised {_describe(error)}") from error


def _describe(error: BaseException) -> str:
    """Describe an error by type, message and place: one raised in someone else's code."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if "importlib" not in f.filename and f.filename != __file__), None)
    where = f" ({place.filename}, line {place.lineno})" if place else ""
    return f"{type(error).__name__}: {error}{where}"


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    name = type(value).__qualname__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _close(attribute: str, owner: Any) -> str:
    names = [n for n in dir(owner) if not n.startswith("_")]
    near = difflib.get_close_matches(attribute, names, n=4, cutoff=0.5)
    if near:
        return _did_you_mean(near)
    own = [
        n
        for n in names
        if callable(getattr(owner, n, None))
        and getattr(getattr(owner, n), "__module__", None) == getattr(owner, "__name__", None)
    ]
    return f"; it defines {', '.join(own[:8])}" if own else ""


def _did_you_mean(near: list[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _instead(target: str) -> str:
    stem = target.rstrip(":")
    return f"; name the callable too, as in {stem}:make" if stem and ":" not in stem else ""
