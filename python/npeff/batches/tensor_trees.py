"""Work on tensors in nested structures: tuples, lists, mappings, dataclasses, and plain objects that hold tensors.

A batch is such a structure; its inputs and its labels are found, and labels replaced, here.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from npeff.errors import DataError

OWN_BATCH = (
    "if its examples lie otherwise, yield npeff.Batch(content, n_examples, take), where take(content, positions) gives "
    "the content of some of them"
)
"""The way out where the examples of a batch cannot be guessed from sizes."""


Path = tuple[str, ...]
"""Where a part lies, as Python would write it: ``("[0]", "['mask']")``."""


def length(part: Any) -> int:
    """Return the length of the dimension that may count the examples, −1 where there is none."""
    if isinstance(part, Tensor):
        return part.size(0) if part.dim() else -1
    return len(part) if isinstance(part, list | tuple) or (isinstance(part, np.ndarray) and part.ndim) else -1


def shown(part: Any) -> str:
    """Describe a part's shape and dtype, for messages."""
    if isinstance(part, Tensor):
        shape = f"({part.size(0)}, nested)" if part.is_nested else str(tuple(part.shape))
        return f"{shape} {str(part.dtype).removeprefix('torch.')}"
    return f"({len(part)} items)" if isinstance(part, list | tuple | np.ndarray) else type(part).__name__


def named(content: Any) -> str:
    """Describe the parts of a batch, for messages."""
    return ", ".join(f"batch{''.join(path)} {shown(part)}" for part, path in parts(content)[:8])


def rows_at(tensor: Tensor, positions: list[int]) -> Tensor:
    """Take some rows of a tensor of any layout; rows side by side as a view."""
    if tensor.is_nested:
        rows = tensor.unbind()
        return torch.nested.as_nested_tensor([rows[i] for i in positions], layout=tensor.layout)
    if tensor.layout != torch.strided:
        index = torch.tensor(positions, device=tensor.device)
        return tensor.to_sparse().index_select(0, index).to_sparse(layout=tensor.layout)
    start = positions[0] if positions else 0
    if positions == list(range(start, start + len(positions))):
        return tensor[start : start + len(positions)]
    return tensor[torch.tensor(positions, device=tensor.device)]


def rebuilt(
    function: Callable[[Any, Path], Any], tree: Any, path: Path = (), other: Callable[[Any], Any] | None = None
) -> Any:
    """Make a structure like this one, with a function applied to its parts.

    Parts are tensors, lists of plain values and arrays of strings; numeric arrays become tensors. Tuples, lists,
    mappings, dataclasses and plain objects that hold tensors are searched for parts.

    Args:
        function: Of a part and where it lies.
        tree: The structure.
        path: Where it lies itself.
        other: Of objects that are neither.
    """

    def below(item: Any, step: str) -> Any:
        return rebuilt(function, item, (*path, step), other)

    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biufc":
        tree = torch.from_numpy(np.ascontiguousarray(tree))
    if isinstance(tree, Tensor) or _is_plain(tree):
        return function(tree, path)
    if isinstance(tree, Mapping):
        return with_entries(tree, {key: below(value, f"[{key!r}]") for key, value in tree.items()})
    if isinstance(tree, PackedSequence):  # whose batch sizes stay on the CPU
        changed = {name: below(getattr(tree, name), f".{name}") for name in tree._fields if name != "batch_sizes"}
        return PackedSequence(batch_sizes=tree.batch_sizes, **changed)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(below(item, f"[{i}]") for i, item in enumerate(tree)))
    if isinstance(tree, (tuple, list)):
        items = [below(item, f"[{i}]") for i, item in enumerate(tree)]
        try:
            return type(tree)(items)
        except TypeError:
            return items
    if (names := _attributes(tree)) is not None:
        made = copy.copy(tree)
        for name in names:
            object.__setattr__(made, name, below(getattr(tree, name), f".{name}"))
        return made
    return tree if other is None else other(tree)


def with_entries(like: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Return a mapping of the same class with other values; a plain dict where the class does not allow that."""
    if type(like) is dict or not isinstance(like, MutableMapping):
        return {**like, **values}
    try:
        made = copy.copy(like)
        for key, value in values.items():
            made[key] = value
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return {**like, **values}
    return made


def _is_plain(tree: Any) -> bool:
    """Whether it is a list of plain values, such as lengths or texts."""
    if isinstance(tree, np.ndarray):
        return tree.dtype.kind in "SU"
    if type(tree) is tuple:  # of strings, as default_collate leaves them; numbers in a tuple are mostly sizes
        return len(tree) > 0 and all(isinstance(item, str | bytes) for item in tree)
    return type(tree) is list and len(tree) > 0 and all(isinstance(item, str | bytes | int | float) for item in tree)


def _attributes(tree: Any) -> list[str] | None:
    """Names of a dataclass's fields, or of an object's attributes where one holds tensors; None for all else."""
    if isinstance(tree, type | nn.Module | Tensor):
        return None
    if is_dataclass(tree):
        return [field.name for field in fields(tree) if hasattr(tree, field.name)]
    try:
        values = vars(tree)
    except TypeError:
        return None
    return list(values) if any(_holds(value) for value in values.values()) else None


def _holds(value: Any) -> bool:
    if type(value) in (list, tuple, dict):
        value = next(iter(value.values() if isinstance(value, dict) else value), None)
    return isinstance(value, Tensor)


def parts(tree: Any, path: Path = ()) -> list[tuple[Any, Path]]:
    """List the parts of a structure and where they lie, in the order of :func:`map_tensors`."""
    found: list[tuple[Any, Path]] = []

    def note(part: Any, where: Path) -> Any:
        found.append((part, where))
        return part

    rebuilt(note, tree, path)
    return found


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """Apply a function to every tensor in nested tuples, lists, mappings, dataclasses and objects that hold tensors.

    Numpy arrays count as tensors.

    Args:
        function: Of a tensor.
        tree: The structure.
        other: Of objects that cannot be gone through; by default they stay.
    """
    return rebuilt(lambda part, _: function(part) if isinstance(part, Tensor) else part, tree, (), other)


def called(item: Any, method: str, *arguments: Any) -> Any:
    """Call an object's own method, if it has one; give the object itself otherwise."""
    found = None if isinstance(item, type) else getattr(item, method, None)
    return found(*arguments) if callable(found) and not isinstance(item, nn.Module) else item


def onto(device: torch.device, content: Any) -> Any:
    """Move a structure to a device, its tensors detached."""

    def move(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return (tensor.clone() if tensor.is_inference() else tensor).to(device, non_blocking=True)

    with torch.inference_mode(False):
        return map_tensors(move, content, None if device.type == "cpu" else lambda item: called(item, "to", device))


def leaves(tree: Any) -> Iterator[Any]:
    """Iterate over all leaves of nested tuples, lists, mappings and dataclasses, each key or name before its value."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield key
            yield from leaves(value)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from leaves(item)
    elif (names := _attributes(tree)) is not None:
        for name in names:
            yield name
            yield from leaves(getattr(tree, name))
    else:
        yield tree


def update_with_tree(digest: hashlib.blake2b, tree: Any, depth: int = 0) -> None:
    """Add a structure's tensors and plain values to a digest, in order; objects count by what they hold."""
    for leaf in leaves(tree):
        if isinstance(leaf, Tensor):
            update_with_tensor(digest, leaf)
        elif isinstance(leaf, np.ndarray) and leaf.dtype.kind in "SU":
            digest.update(repr(leaf.tolist()).encode())
        elif isinstance(leaf, str | bytes | bool | None):
            digest.update(repr(leaf).encode())
        elif isinstance(leaf, int | float | complex | np.generic | slice | range):
            digest.update(f"{leaf!r},".encode())  # 1, 23 are not 12, 3
        elif isinstance(leaf, set | frozenset):
            digest.update(repr(sorted(map(repr, leaf))).encode())
        elif hasattr(leaf, "__array_interface__"):  # pictures, dates, arrays of objects
            array = np.asarray(leaf)
            digest.update(f"{array.shape}{array.dtype}".encode())
            if not array.dtype.hasobject:
                digest.update(array.tobytes())
            elif depth < 3:
                update_with_tree(digest, array.tolist(), depth + 1)
        elif depth < 3 and not isinstance(leaf, nn.Module | type) and hasattr(leaf, "__dict__"):
            update_with_tree(digest, vars(leaf), depth + 1)  # what an object holds, as far as that can be seen


def update_with_tensor(digest: hashlib.blake2b, tensor: Tensor) -> None:
    """Add a tensor's shape, dtype and bytes to a digest."""
    tensor = tensor.detach()
    if tensor.is_nested:
        for part in tensor.unbind():
            update_with_tensor(digest, part)
        return
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg()
    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    if tensor.numel():
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)


# ---- inputs and labels ----------------------------------------------------------------------------------------------


def inputs_in(content: Any) -> Any:
    """Return the arguments of a model: a batch's content without its labels."""
    if isinstance(content, Mapping):
        if "labels" not in content:
            return content
        return {key: value for key, value in content.items() if key != "labels"}
    return content[0] if isinstance(content, (tuple, list)) else content


def labels_in(content: Any, device: torch.device, where: str) -> Tensor | None:
    """Find what stands for the labels in a batch's content.

    Raises:
        DataError: It is one label, or not numbers.
    """
    labels: Any = None
    if isinstance(content, Mapping):
        labels = content.get("labels")
    elif isinstance(content, (tuple, list)):
        labels = content[1] if len(content) == 2 else None
    elif not isinstance(content, Tensor):
        labels = getattr(content, "labels", None)
    if isinstance(labels, int) or (isinstance(labels, Tensor) and labels.dim() == 0):
        raise DataError(
            f"data: {where} has a single label, so it is one example; wrap the data in "
            "torch.utils.data.DataLoader(data, batch_size=64)"
        )
    if isinstance(labels, (list, tuple, np.ndarray)):
        try:
            labels = torch.as_tensor(labels, device=device)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise DataError(
                f"labels: expected integers; encode strings as class numbers ({where}: {error}); the second item of "
                f"a batch stands for its labels; {OWN_BATCH}"
            ) from error
    return labels if isinstance(labels, Tensor) else None


def relabelled(content: Any, labels: Tensor) -> Any:
    """Put other labels into a batch's content."""
    if isinstance(content, Mapping):
        return with_entries(content, {"labels": labels})
    if hasattr(content, "_replace"):
        return content._replace(**{content._fields[1]: labels})
    if isinstance(content, tuple | list):
        return type(content)([content[0], labels])
    made = copy.copy(content)
    object.__setattr__(made, "labels", labels)
    return made
