"""Positions in texts as examples: where they are, what their labels are, and what is refused."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from npeff.errors import ArgumentError, DataError
from npeff.language import Places
from tiny_language import VOCABULARY, model_of, tokenizer_of

pytest.importorskip("transformers")

TEXTS = ["The capital of France is", "The colour of the sky is blue. The colour of grass is"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of()


def examples(places: Places) -> list[tuple[str, str]]:
    """Each example's token and its label."""
    found = [places.example(i) for i in range(places.n_examples)]
    return [(place.tokens[place.index], place.label) for place in found]


def from_batches(places: Places) -> np.ndarray:
    """The classes of the examples, in the order of the batches."""
    labels = [content["labels"] for content in contents(places)]
    return np.concatenate([part[part != -100].numpy() for part in labels])


def contents(places: Places) -> list[dict[str, Any]]:
    """What the batches hold."""
    return [batch.content for batch in places]


# ---- where and labels -----------------------------------------------------------------------------------------


def test_last_token_of_each_text(tokenizer: Any) -> None:
    places = Places(tokenizer, TEXTS)
    assert examples(places) == [(" is", ""), (" is", "")]
    assert places.places[:, 0].tolist() == [0, 1] and places.labels.tolist() == [-1, -1]
    (batch,) = contents(places)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    at = torch.argwhere(batch["labels"] != -100)
    assert at[:, 1].tolist() == [int(row.sum()) - 1 for row in batch["attention_mask"]]


def test_every_token_predicts_the_next(tokenizer: Any) -> None:
    places = Places(tokenizer, TEXTS, "every")
    tokens = ["".join(places.example(i).tokens) for i in (0, places.n_examples - 1)]
    assert tokens == TEXTS, "the tokens together are the text"
    words = examples(places)
    first = int((places.places[:, 0] == 0).sum())
    assert [label for _, label in words[: first - 1]] == [token for token, _ in words[1:first]]
    assert words[first - 1] == (" is", "")
    (batch,) = contents(places)
    np.testing.assert_array_equal(batch["labels"][:, :-1][0, : first - 1], batch["input_ids"][0, 1:first])
    np.testing.assert_array_equal(from_batches(places), places.labels)


def test_matches_of_a_regular_expression(tokenizer: Any) -> None:
    places = Places(tokenizer, [*TEXTS, "no match"], r"colour of (the )?\w+ is")
    assert examples(places) == [(" is", " blue"), (" is", "")]
    assert places.places[:, 0].tolist() == [1, 1]


def test_positions_of_a_callable(tokenizer: Any) -> None:
    places = Places(tokenizer, TEXTS, lambda text, tokens: [i for i, token in enumerate(tokens) if token == " of"])
    assert [token for token, _ in examples(places)] == [" of"] * 3
    assert examples(places)[1][1] == " the"


def test_tokens_that_the_tokenizer_adds_are_no_places() -> None:
    tokenizer = tokenizer_of(begin=True)
    places = Places(tokenizer, TEXTS[:1], "every")
    assert places.places[:, 1].min() == 1 and places.example(0).tokens[0] == "<s>"
    assert Places(tokenizer, TEXTS[:1], lambda text, tokens: [0]).n_examples == 1


def test_characters_of_several_tokens(tokenizer: Any) -> None:
    places = Places(tokenizer, ["is it 😀 good?"], "😀")
    place = places.example(0)
    assert "".join(place.tokens) == "is it 😀 good?" and "".join(place.tokens[: place.index + 1]) == "is it 😀"


def test_context_makes_a_sequence_of_each_place() -> None:
    tokenizer = tokenizer_of(begin=True)
    whole, places = Places(tokenizer, TEXTS, "every"), Places(tokenizer, TEXTS, "every", context=2)
    np.testing.assert_array_equal(whole.places, places.places)
    np.testing.assert_array_equal(whole.labels, places.labels)
    found = places.example(4)
    assert found.tokens == ("<s>", *whole.example(4).tokens[3:6])
    assert found.index == 3 and found.text == 0
    assert all(batch["input_ids"].shape[1] <= 4 for batch in contents(places))


def test_labels_of_a_column(tokenizer: Any) -> None:
    rows = [{"text": TEXTS[0], "answer": " Paris"}, {"text": TEXTS[1], "answer": None}]
    places = Places(tokenizer, rows, label_column="answer")
    assert [label for _, label in examples(places)] == [" Paris", ""]


def test_a_masked_token_is_predicted_where_it_stands(tokenizer: Any) -> None:
    rows = {"text": ["The capital of[MASK] is Paris.", "The colour of[MASK] is"], "label": [" France", None]}
    places = Places(tokenizer, rows, r"\[MASK\]", label_column="label")
    assert [label for _, label in examples(places)] == [" France", ""]


def test_answers_are_the_classes(tokenizer: Any) -> None:
    rows = [{"text": "Is it good?", "label": label} for label in (" yes", " no", 1, "0", None, float("nan"))]
    places = Places(tokenizer, rows, answers=[" yes", " no"], label_column="label")
    assert places.labels.tolist() == [0, 1, 1, 0, -1, -1]
    (batch,) = places
    assert batch.outputs is not None and places.outputs is not None
    assert batch.outputs.tolist() == places.outputs.tolist() and places.output_names([0, 1]) == [" yes", " no"]
    assert [tokenizer.decode([i]) for i in places.outputs] == [" yes", " no"]
    next_word = Places(tokenizer, ["Is it good? yes Is it bad? no"], r"\?", answers=[" yes", " no"])
    assert next_word.labels.tolist() == [0, 1]


@pytest.mark.parametrize("words", [[" yes", " no"], ["yes", "no"]])
def test_words_without_their_space_are_noticed(tokenizer: Any, words: list[str]) -> None:
    rows = [{"text": text, "label": words[0]} for text in ("Is it good?", "Is it bad?", 'They said "')]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Places(tokenizer, rows[2:], answers=words, label_column="label")
        if words[0][0] == " ":
            Places(tokenizer, rows, answers=words, label_column="label")
            Places(tokenizer, rows, label_column="label")
            return
    for options, name, meant in (({"answers": words}, "answers", "' yes', ' no'"), ({}, "label_column", "' yes'")):
        found = f"{name}: got {meant.replace(' y', 'y').replace(' n', 'n')}, without a space before, .* for {meant}, w"
        with pytest.warns(UserWarning, match=found) as caught:
            Places(tokenizer, rows, label_column="label", **options)  # type: ignore[arg-type]
        assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize("context", [None, 3])
def test_tokens_put_after_the_text_are_no_places(context: int | None) -> None:
    plain, ending = tokenizer_of(begin=True), tokenizer_of(begin=True, end=True)
    assert ending("yes")["input_ids"] == [*plain("yes")["input_ids"], ending.eos_token_id]
    for where in ("last", "every", "is$"):
        for answers in (None, [" yes", " no"]):
            one, other = (Places(t, TEXTS, where, answers=answers, context=context) for t in (plain, ending))
            np.testing.assert_array_equal(one.places, other.places)
            np.testing.assert_array_equal(one.labels, other.labels)
            assert examples(one) == examples(other)
    labelled = [{"text": TEXTS[0], "answer": " Paris"}]
    assert examples(Places(ending, labelled, label_column="answer", context=context)) == [(" is", " Paris")]


# ---- batches --------------------------------------------------------------------------------------------------


def test_batches_are_bounded_and_come_again(tokenizer: Any) -> None:
    texts = [" yes" * n for n in (3, 9, 1, 12, 5, 5, 2)]
    for sort in (False, True):
        places = Places(tokenizer, texts, "every", batch_tokens=24, sort=sort)
        batches = contents(places)
        assert len(batches) == len(places) > 1
        assert all(batch["input_ids"].numel() <= 24 for batch in batches)
        for one, two in zip(batches, contents(places), strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)
        np.testing.assert_array_equal(from_batches(places), places.labels)
    assert places.places[0, 0] == 3, "the longest first"
    assert batches[0]["input_ids"].shape[1] == 12
    unsorted = Places(tokenizer, texts, batch_tokens=24)
    assert unsorted.places[:, 0].tolist() == list(range(7)), "one example per text, in their order"


def test_padding_on_the_left(tokenizer: Any) -> None:
    right, left = Places(tokenizer, TEXTS, "every"), Places(tokenizer, TEXTS, "every", padding_side="left")
    np.testing.assert_array_equal(right.labels, left.labels)
    (one,), (two,) = contents(right), contents(left)
    assert "position_ids" not in one
    kept = two["attention_mask"].bool()
    assert torch.equal(one["input_ids"][one["attention_mask"].bool()], two["input_ids"][kept])
    assert two["position_ids"][0, kept[0]].tolist() == list(range(int(kept[0].sum())))
    assert not kept[0, 0] and kept[:, -1].all()


# ---- sources --------------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"prompt": TEXTS[0], "answer": " Paris"}, {"prompt": TEXTS[1], "answer": " green"}]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "saved", "frame", "dataset", "columns", "list"])
def test_the_same_from_every_source(tokenizer: Any, rows: list[dict[str, Any]], kind: str, tmp_path: Path) -> None:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    path, source = tmp_path / f"data.{kind}", None
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow.parquet")
        pyarrow.write_table(__import__("pyarrow").table(columns), path)
    elif kind == "frame":
        source = pytest.importorskip("pandas").DataFrame(columns)
    elif kind in ("dataset", "saved"):
        source = pytest.importorskip("datasets").Dataset.from_dict(columns)
        if kind == "saved":
            source.save_to_disk(path)
            source = None
    else:
        source = columns if kind == "columns" else rows
    places = Places(tokenizer, path if source is None else source, text_column="prompt", label_column="answer")
    assert examples(places) == [(" is", " Paris"), (" is", " green")]


def test_texts_without_columns(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text(f"{TEXTS[0]}\n\n{TEXTS[1]}\n")
    assert Places(tokenizer, tmp_path / "texts.txt").n_examples == 2
    assert Places(tokenizer, iter(TEXTS)).n_examples == 2
    pandas = pytest.importorskip("pandas")
    assert Places(tokenizer, pandas.Series(TEXTS, index=[7, 9])).n_examples == 2


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (TEXTS, {"where": "("}, r"where: .* '\(' is none: missing \)"),
        (TEXTS, {"where": 3}, "where: expected 'last', 'every', a regular expression or a callable, got 3"),
        (TEXTS, {"where": lambda text, tokens: [99]}, "where: expected positions from 0 to .* of text 0, got"),
        (TEXTS, {"where": lambda text, tokens: 5}, "where: expected positions of tokens of text 0, got 5"),
        (TEXTS, {"where": lambda text, tokens: [1, 10**30]}, "where: expected positions from 0 to .* of text 0, got"),
        (TEXTS, {"where": lambda text, tokens: [token == " of" for token in tokens]}, "got True and False: give the n"),
        (TEXTS, {"where": lambda text, tokens: torch.ones(len(tokens)) > 0}, "got True and False: give the numbers"),
        (TEXTS, {"where": "never there"}, "where: 'never there' finds no place in any of the 2 texts"),
        (TEXTS, {"answers": [" yes"]}, "answers: expected at least two different words"),
        (TEXTS, {"answers": {" yes", " no"}}, "answers: expected at least two different words in a list, got"),
        (TEXTS, {"answers": 5}, "answers: expected at least two different words in a list, got 5"),
        (TEXTS, {"answers": [" yes", "\ud800"]}, "answers: .* has half a surrogate pair"),
        (TEXTS, {"answers": [" yes", " Zanzibar"]}, "' Zanzibar' after 'The capital of France is' becomes ' ', 'Z'"),
        (["Is it good?"], {"answers": ["yes", "bad"]}, "answers: .* 'bad' .* perhaps with a space before it, ' bad'"),
        (["Is it good? "], {"answers": ["yes", "no"]}, "the text ends in white space"),
        (TEXTS, {"context": -1}, "context: expected an integer ≥ 0, got -1"),
        (TEXTS, {"context": True}, "context: expected an integer ≥ 0, got True"),
        (TEXTS, {"batch_tokens": 0}, "batch_tokens: expected an integer ≥ 1"),
        (TEXTS, {"batch_tokens": 6}, "batch_tokens: expected at least .*, the number of tokens of text 1, got 6"),
        (TEXTS, {"padding_side": "both"}, "padding_side: expected 'right' or 'left', got 'both'"),
        (TEXTS, {"label_column": "label"}, "text 0 is no mapping, so it has no label_column='label'"),
        (["a", "  "], {}, "text 1 is empty"),
        (["a", None], {}, "text 1 is None; expected a text"),
        ([], {}, "texts: there are none"),
        (5, {}, "texts: expected a list of texts, .* got int"),
        ({"It is", "It was"}, {}, "texts: expected a list of texts, .* got set"),
        ("It is good. " * 100, {}, "texts: there is no file It is good.*…; for one text pass a list"),
        ("It\0is", {}, "texts: there is no file"),
        (["a", "b\ud800"], {}, "texts: text 1 has half a surrogate pair"),
        ({"text": "It is"}, {}, "texts: expected a column of values as text_column='text', got 'It is'"),
        ({"text": ["It is"], "l": [1, 0]}, {"label_column": "l"}, "texts: expected as many labels as texts, got 2 in"),
        (TEXTS, {"text_column": None}, "text_column: expected the name of a column, got None"),
        ("absent.jsonl", {}, "there is no file absent.jsonl; for one text pass a list"),
        ([{"prompt": "a"}], {}, "text 0 has no text_column='text'; it has prompt"),
        ({"prompt": ["a"]}, {}, "there is no text_column='text'; the columns are prompt"),
        ([{"text": "a", "label": 3}], {"label_column": "label"}, "label of text 0: .* got 3; numbers need answers="),
        ([{"text": "a is", "label": " of France"}], {"label_column": "label"}, "label of text 0: .* becomes"),
        (
            [{"text": "Is it?", "label": "perhaps"}],
            {"label_column": "label", "answers": [" yes", " no"]},
            "label of text 0: expected one of the answers ' yes', ' no' or its position from 0, got 'perhaps'",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(tokenizer: Any, texts: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises((ArgumentError, DataError), match=words):
        Places(tokenizer, texts, **options)


@pytest.mark.parametrize("label", [1.5, float("inf"), True, np.array([1, 0]), [1], {"a": 1}, "True", -1])
def test_labels_that_are_no_answers(tokenizer: Any, label: Any) -> None:
    with pytest.raises(
        ArgumentError, match="label of text 0: expected one of the answers ' yes', ' no' or its position"
    ):
        Places(tokenizer, [{"text": "Is it?", "label": label}], answers=[" yes", " no"], label_column="label")


def test_answers_that_are_numbers_are_no_positions(tokenizer: Any) -> None:
    def labels(given: Any) -> list[int]:
        row = {"text": "Is it?", "label": given}
        return Places(tokenizer, [row], answers=["1", "0"], label_column="label").labels.tolist()

    assert (labels("1"), labels("0")) == ([0], [1])
    for given in (1, 0, " 1"):
        with pytest.raises(
            ArgumentError, match=r"may be the answer '[01]' or a position from 0; give the answer as it"
        ):
            labels(given)


def test_labels_that_pandas_lacks(tokenizer: Any) -> None:
    pandas = pytest.importorskip("pandas")
    for labels in (pandas.array([1, None], dtype="Int64"), pandas.array([" no", None], dtype="string"), [1.0, None]):
        frame = pandas.DataFrame({"text": ["Is it?", "Is it?"], "label": labels})
        places = Places(tokenizer, frame, answers=[" yes", " no"], label_column="label")
        assert places.labels.tolist() == [1, -1]
    twice = pandas.DataFrame([["a", "b"]], columns=["text", "text"])
    with pytest.raises(DataError, match="texts: there are 2 columns text_column='text'; rename all but one"):
        Places(tokenizer, twice)


def test_words_that_the_tokenizer_does_not_know() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "is": 1, "yes": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    few = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    with pytest.raises(
        ArgumentError, match=r"answers: .* ' never' becomes '\[UNK\]', as all words that it does not know"
    ):
        Places(few, ["is"], answers=[" yes", " never"])


def test_white_space_without_characters_of_its_own() -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    places = Places(tokenizer, ["  a   b  "], "every")
    assert ["".join(places.example(i).tokens) for i in (0, places.n_examples - 1)] == ["  a   b  "] * 2
    assert places.places[:, 1].tolist() == list(range(places.n_examples)) and (places.labels[:-1] >= 0).all()


def test_lines_end_where_files_say(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffIt\u2028 is\r\nok\x0b\x85x".encode())
    places = Places(tokenizer, tmp_path / "a.txt")
    assert ["".join(places.example(i).tokens) for i in range(2)] == ["It\u2028 is", "ok\x0b\x85x"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "It is"}\n')
    assert Places(tokenizer, tmp_path / "a.jsonl").n_examples == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "[" * 200_000, "a.jsonl, line 1 is no JSON"),
        ("a.jsonl", '{"text": "a", "n": ' + "1" * 5000 + "}", "a.jsonl, line 1 is no JSON"),
        ("a.jsonl", '{"text": "a\\ud800"}', "a.jsonl, line 1 has half a surrogate pair"),
        (
            "a.csv",
            "text,label\na, b, c\n",
            "a.csv, line 2 has 3 cells, and the first line names 2; put cells that hold ','",
        ),
        ("a.csv", "text,text\na,b\n", "a.csv has 2 columns 'text'; rename all but one"),
        ("a.csv", 'text\n"a\nb\n', "a.csv cannot be read: unexpected end of data"),
        ("a.tsv", 'text\tn\n"a\t1\nb" c\t2\n', "a.tsv cannot be read: "),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is no JSON"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "b"}\n', "a.jsonl, line 2 has no text_column='text'; it has prompt"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ""}\n', "a.jsonl, line 3 is empty"),
        ("a.jsonl", '{"text": 5}\n', "a.jsonl, line 1 is 5; expected a text"),
        ("a.csv", "prompt\na\n", "a.csv, line 2 has no text_column='text'; it has prompt"),
        ("a.csv", "label,text\n1,a\n2\n", "a.csv, line 3 has fewer columns than the first line, 2"),
        ("a.parquet", "text", "a.parquet cannot be read"),
        ("a.pdf", "text", "expected a file ending in .txt, .jsonl"),
        ("a.txt", "\n\n", "texts: there are none"),
    ],
)
def test_files_that_cannot_be_read(tokenizer: Any, tmp_path: Path, name: str, content: str, words: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises((ArgumentError, DataError), match=words):
        Places(tokenizer, tmp_path / name)


def test_a_folder_without_a_dataset(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="holds no dataset written by"):
        Places(tokenizer, tmp_path)


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"tokenizer: expected a fast tokenizer of transformers .* got object"):
        Places(object(), TEXTS)


def test_example_that_is_not_there(tokenizer: Any) -> None:
    with pytest.raises(ArgumentError, match="number: expected an example from 0 to 1, got 2"):
        Places(tokenizer, TEXTS).example(2)
    with pytest.raises(ArgumentError, match=r"number: expected an example from 0 to 1, got 0\.0"):
        Places(tokenizer, TEXTS).example(0.0)  # type: ignore[arg-type]


def test_outputs_that_are_no_tokens_have_a_name(tokenizer: Any) -> None:
    assert Places(tokenizer, TEXTS).output_names([VOCABULARY + 7, 262]) == [f"<unused {VOCABULARY + 7}>", " is"]


def test_models_without_embeddings_are_not_compared(tokenizer: Any) -> None:
    class Other(torch.nn.Module):
        def get_input_embeddings(self) -> None:
            raise NotImplementedError

    Places(tokenizer, TEXTS).check_model(Other())


def test_model_and_tokenizer_that_do_not_fit(tokenizer: Any) -> None:
    places = Places(tokenizer, TEXTS)
    places.check_model(model_of())
    places.check_model(torch.nn.Linear(2, 3))
    with pytest.raises(ArgumentError, match=f"tokenizer: it has {VOCABULARY} tokens, and LlamaForCausalLM embeds 300"):
        places.check_model(model_of(vocab_size=300))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sequences_beyond_the_models_length(tokenizer: Any, kind: str) -> None:
    places = Places(tokenizer, ["is", " yes" * 65])
    with pytest.raises(ArgumentError, match=r"texts: text 1 has 65 tokens, and .* was made for at most 64; cut"):
        places.check_model(model_of(kind))
    Places(tokenizer, ["is", " yes" * 65], "every", context=8).check_model(model_of(kind))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma2", "mamba"])
def test_padding_changes_no_prediction(tokenizer: Any, kind: str) -> None:
    model = model_of(kind)
    found = []
    for options in ({}, {"padding_side": "left"}, {"batch_tokens": 20}):
        places = Places(tokenizer, TEXTS, "every", **options)  # type: ignore[arg-type]
        with torch.no_grad():
            found.append(torch.cat([model(**inputs_of(b)).logits[b["labels"] != -100] for b in contents(places)]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=1e-4)


def inputs_of(batch: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
