"""MODEL and DATA of the command line: what is found, and how precisely what is wrong is told."""

import os
import sys

import pytest
import torch

from npeff.errors import ArgumentError, DataError, ModelError
from npeff.models.targets import load_data, load_model, load_object

SOURCE = """
import torch
import neighbour_of_targets

class Zoo:
    @staticmethod
    def small():
        return torch.nn.Linear(2, 3)

instance = torch.nn.Linear(4, 5)
calls = []

def model():
    calls.append(1)
    return torch.nn.Linear(neighbour_of_targets.WIDTH, 2)

def data():
    return [(torch.zeros(2, 7), torch.zeros(2))]

def generated():
    yield torch.zeros(2, 7)

def raises():
    return {}["absent"]

def type_error_inside():
    return len(3)

def needs(argument):
    return argument

def interrupted():
    raise KeyboardInterrupt

def returns_none(): pass
def a_tensor(): return torch.zeros(3)
def a_dict(): return {"inputs": torch.zeros(3)}
batches = [torch.zeros(1, 7)]
number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "zoo_of_targets.py").write_text(SOURCE)
    (tmp_path / "neighbour_of_targets.py").write_text("WIDTH = 7\n")
    (tmp_path / "broken_of_targets.py").write_text("import torch\nraise RuntimeError('no licence')\n")
    (tmp_path / "syntax_of_targets.py").write_text("def f(:\n")
    (tmp_path / "imports_of_targets.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if "of_targets" in name:
            del sys.modules[name]


@pytest.mark.parametrize("source", ["zoo_of_targets.py", "./zoo_of_targets.py", "zoo_of_targets"])
def test_model_of_file_and_module(folder, source):
    assert load_model(f"{source}:model").in_features == 7
    assert load_model(f"{source}:Zoo.small").out_features == 3
    assert load_model(f"{source}:instance").out_features == 5


def test_file_from_elsewhere_finds_its_neighbours(folder, monkeypatch):
    monkeypatch.chdir(os.sep)
    assert load_model(f"{folder / 'zoo_of_targets.py'}:model").in_features == 7


def test_model_and_data_share_one_module(folder):
    load_model("zoo_of_targets.py:model")
    assert load_object("zoo_of_targets.py:calls") == [1]


def test_data(folder):
    assert len(list(load_data("zoo_of_targets:data"))) == 1
    assert len(list(load_data("zoo_of_targets:generated"))) == 1
    assert len(list(load_data("zoo_of_targets:batches"))) == 1


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("zoo_of_targets.py", ["expected package.module:callable or path/to/file.py:callable", ":make"]),
        (":model", ["expected package.module:callable"]),
        (
            "zo_of_targets.py:model",
            ["file zo_of_targets.py does not exist", "did you mean zoo_of_targets.py"],
        ),
        ("absent/zoo.py:model", ["absent/zoo.py does not exist", "current directory"]),
        ("zoo_of_target:model", ["no module 'zoo_of_target'", "did you mean zoo_of_targets"]),
        ("zoo_of_targets.py:modle", ["zoo_of_targets.py has no 'modle'", "did you mean model?"]),
        ("zoo_of_targets.py:xyzzyx", ["has no 'xyzzyx'", "it defines", "model"]),
        ("zoo_of_targets.py:Zoo.smal", ["zoo_of_targets.py:Zoo has no 'smal'", "did you mean small?"]),
        ("broken_of_targets.py:f", ["importing", "raised RuntimeError: no licence", "line 2"]),
        ("broken_of_targets:f", ["importing broken_of_targets raised RuntimeError: no licence"]),
        ("syntax_of_targets.py:f", ["raised SyntaxError", "line 1"]),
        ("imports_of_targets.py:f", ["raised ModuleNotFoundError: No module named 'surely_not_installed'"]),
        ("imports_of_targets:f", ["raised ModuleNotFoundError: No module named 'surely_not_installed'"]),
        ("zoo_of_targets.py:number", ["is an int, expected something to call"]),
        ("zoo_of_targets.py:needs", ["must be callable without arguments", "argument"]),
    ],
)
def test_what_is_wrong_with_a_target(folder, target, words):
    with pytest.raises(ArgumentError) as caught:
        load_model(target)
    message = str(caught.value)
    assert message.startswith("MODEL: ")
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("callable_", "words"),
    [
        ("raises", ["raises() raised KeyError: 'absent'", "zoo_of_targets.py, line"]),
        ("type_error_inside", ["raised TypeError"]),
        ("returns_none", ["returned None, expected a torch.nn.Module"]),
        ("a_tensor", ["returned a Tensor, expected a torch.nn.Module"]),
    ],
)
def test_what_is_wrong_with_a_model(folder, callable_, words):
    with pytest.raises(ModelError) as caught:
        load_model(f"zoo_of_targets.py:{callable_}")
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


@pytest.mark.parametrize(
    ("callable_", "words"),
    [
        ("raises", ["DATA", "raised KeyError"]),
        ("returns_none", ["returned None, expected an iterable of batches"]),
        ("a_tensor", ["gave a Tensor", "return [batch]"]),
        ("a_dict", ["gave a dict"]),
    ],
)
def test_what_is_wrong_with_data(folder, callable_, words):
    with pytest.raises(DataError) as caught:
        load_data(f"zoo_of_targets.py:{callable_}")
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_interrupts_pass(folder):
    with pytest.raises(KeyboardInterrupt):
        load_data("zoo_of_targets.py:interrupted")


def test_a_file_that_failed_is_read_again(folder):
    path = folder / "broken_of_targets.py"
    with pytest.raises(ArgumentError):
        load_object("broken_of_targets.py:f")
    path.write_text("def f(): return 1\n")
    assert load_object("broken_of_targets.py:f")() == 1


def test_module_classes_are_called():
    assert isinstance(load_model("torch.nn:Identity"), torch.nn.Identity)
