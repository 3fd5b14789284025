"""The way of a language model: from a folder and a file of texts, by the commands, to a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import npeff
from npeff.cli import run
from npeff.errors import ArgumentError, DataError
from npeff.gradients.eligibility import linear_in_blocks
from npeff.language import Places
from npeff.models.targets import load_model
from tiny_language import model_of, tokenizer_of, working_beside_a_model

pytest.importorskip("transformers")

THINGS = ("France", "Spain", "grass", "the sky", "The answer", "it", "no", "the colour")
TEXTS = [f"{start} {thing} is" for start in ("The capital of", "The colour of", "Is it good? yes") for thing in THINGS]
FOLDED = ["--sketch", "64", "--rank", "2", "--quiet"]
FEW = ["--n-random", "1", "--top", "6", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, its tokenizer and texts on the disk; Fishers and components, by the commands."""
    with working_beside_a_model(tmp_path_factory.mktemp("language")) as path:
        rows = [{"prompt": text, "answer": " yes" if i % 2 else " no"} for i, text in enumerate(TEXTS)]
        Path("texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        command = ["fishers", "hf:model", "texts.jsonl", *FOLDED, "--text-column", "prompt", "--label-column", "answer"]
        assert run([*command, "--out", "f.h5"]) == 0
        assert run(["decompose", "f.h5", "--n-components", "3", "--n-init", "1", "--quiet", "--out", "c.h5"]) == 0
        assert run(["recover", "c.h5", "hf:model", "texts.jsonl", "--quiet", "--out", "r.h5"]) == 0
        yield path


def test_fishers_are_about_the_blocks_and_say_so(folder: Path) -> None:
    fishers = npeff.load("f.h5")
    assert isinstance(fishers, npeff.Fishers)
    model = load_model("hf:model")
    assert {parameter.name for parameter in fishers.parameters} == linear_in_blocks(model)
    assert fishers.provenance["options"]["parameters"] == ["blocks"]
    about = fishers.provenance["places"]
    assert about["tokenizer"] == "model" and about["where"] == "last" and about["text_column"] == "prompt"
    words = [" yes" if i % 2 else " no" for i in range(len(TEXTS))]
    places = Places.described(about, "texts.jsonl")
    assert [places.example(i).label for i in range(len(TEXTS))] == words
    np.testing.assert_array_equal(places.labels, fishers.labels)


def test_components_are_moved_and_shown(folder: Path, capsys: Any) -> None:
    Path("news.txt").write_text("The sky is green.\nIs the answer no? It is.\n")
    texts = ["--unrelated", "news.txt", "--prompts", "2", "--n-tokens", "3"]
    assert run(["perturb", "hf:model", "texts.jsonl", "r.h5", "-j", "0", *FEW, *texts, "--out", "effect.json"]) == 0
    said, effect = capsys.readouterr().out, json.loads(Path("effect.json").read_text())
    before, after = effect["perplexity"]
    assert f"perplexity on unrelated data: {before:.4g} → {after:.4g}" in said
    assert "most probable before → after" in said and "→" in said.splitlines()[-2]
    assert [told["prompt"] for told in effect["continuations"]] == [
        TEXTS[told["id"]] for told in effect["continuations"]
    ]
    assert run(["trace", "hf:model", "texts.jsonl", "r.h5", "-j", "0", "--top", "6", "--quiet"]) == 0
    shown = ["report", "r.h5", "--data", "texts.jsonl", "--extras", "effect.json", "--quiet", "--out", "page.html"]
    assert run(shown) == 0
    assert Path("page.html").stat().st_size > 50_000


def test_the_same_in_python(folder: Path) -> None:
    places = Places(tokenizer_of(), [{"prompt": text} for text in TEXTS], text_column="prompt")
    compress = npeff.Sketch(64)
    fishers = npeff.compute_fishers(load_model("hf:model"), places, compress=compress, rank=2, progress=False)
    stored = npeff.load("f.h5")
    assert isinstance(stored, npeff.Fishers)
    np.testing.assert_allclose(fishers.norms, stored.norms, rtol=1e-4)
    options: dict[str, Any] = {"compress": compress, "rank": 1, "parameters": "*", "progress": False}
    assert npeff.compute_fishers(load_model("hf:model"), places, **options).n_parameters > fishers.n_parameters


def test_answers_are_all_that_is_predicted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fishers", "hf:model", "texts.jsonl", "--exact", "--quiet", "--text-column", "prompt", "--out", "a.h5"]
    assert run([*command, "--answers", " yes", "--answers", " no", "--label-column", "answer"]) == 0
    fishers = npeff.load("a.h5")
    assert isinstance(fishers, npeff.Fishers)
    assert fishers.logits.shape == (len(TEXTS), 2) and fishers.ranks.max() == 1
    assert fishers.labels.tolist() == [1 - i % 2 for i in range(len(TEXTS))]
    model, tokenizer = load_model("hf:model"), tokenizer_of()
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(TEXTS[3])["input_ids"]])).logits[0, -1]
    yes, no = tokenizer(" yes no")["input_ids"]
    np.testing.assert_allclose(fishers.logits[3], logits[[yes, no]], rtol=1e-4, atol=1e-6)


def test_every_token_of_a_plain_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts.txt").write_text("\n".join(TEXTS[:4]))
    assert run(["fishers", "hf:model", "texts.txt", *FOLDED, "--where", "every", "--out", "e.h5"]) == 0
    assert "of the linear layers of the blocks, 14; --parameters '*' takes all" in capsys.readouterr().err
    some = ["--where", "(capital) of", "--parameters", "*mlp*"]
    assert run(["fishers", "hf:model", "texts.txt", *FOLDED, *some, "--out", "m.h5"]) == 0
    assert "of the linear layers" not in capsys.readouterr().err
    counts = [len(npeff.load(name)) for name in ("e.h5", "m.h5")]  # type: ignore[arg-type]
    tokenizer = tokenizer_of()
    assert counts == [sum(len(tokenizer(text)["input_ids"]) for text in TEXTS[:4]), 4]


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        (["fishers", "net.py:model", "texts.jsonl"], 2, "MODEL tells of no tokenizer; give MODEL as hf:PATH"),
        (["fishers", "hf:model", "net.py:data", "--where", "every"], 2, "--where belongs to DATA that is a file of"),
        (["fishers", "hf:model", "texts.jsonl"], 1, "texts.jsonl, line 1 has no text_column='text'; it has prompt"),
        (["fishers", "hf:model", "absent.jsonl"], 1, "there is no file absent.jsonl"),
        (["fishers", "hf:absent", "texts.txt"], 1, "from hf:absent"),
    ],
)  # fmt: skip
def test_what_the_commands_refuse(
    folder: Path, capsys: pytest.CaptureFixture[str], command: list[str], status: int, words: str
) -> None:
    Path("texts.txt").write_text("\n".join(TEXTS[:4]))
    assert run([*command, "--quiet", "--out", "no.h5"]) == status
    assert words in " ".join(capsys.readouterr().err.split())


def test_components_of_other_data_take_no_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    fishers = npeff.compute_fishers(torch.nn.Linear(4, 3), [x], progress=False)
    npeff.decompose(fishers, n_components=1, progress=False).save("other.h5")
    assert run(["report", "other.h5", "--data", "texts.jsonl", "--quiet", "--out", "no.html"]) == 2
    assert "these components were not made from one" in " ".join(capsys.readouterr().err.split())


def test_a_page_shows_no_other_places(folder: Path) -> None:
    components = npeff.load("c.h5")
    assert isinstance(components, npeff.Components)
    tokenizer = tokenizer_of(Path("model"))
    rows = [json.loads(line) for line in Path("texts.jsonl").read_text().splitlines()]
    about: dict[str, Any] = {"text_column": "prompt"}
    for texts, options in (
        ([{"prompt": row["prompt"].replace("of", "is")} for row in rows], {}),
        (rows[::-1], {}),
        (rows, {"where": "^The|^Is"}),
        (rows, {"answers": [" yes", " no"]}),
        (rows, {"context": 1}),
    ):
        with pytest.raises(DataError, match="data: these places are not those that the Fishers were computed from"):
            npeff.report(components, Places(tokenizer, texts, **about | options), out="no.html", progress=False)
    longer = Places(tokenizer, [*rows, {"prompt": "no"}], batch_tokens=30, **about)
    assert npeff.report(components, longer, out="longer.html", progress=False).exists()


def test_fishers_of_other_answers_or_tokens_are_not_encoded(folder: Path) -> None:
    model, quick = load_model("hf:model"), {"rank": 1, "progress": False}
    tokenizer, padded, other = tokenizer_of(), tokenizer_of(), tokenizer_of(corpus=[*TEXTS, " yes no"])
    tokenizer.name_or_path = "model"
    padded.add_special_tokens({"pad_token": "[PAD]"})

    def fishers(tokenizer: Any = tokenizer, answers: Any = (" yes", " no")) -> npeff.Fishers:
        return npeff.compute_fishers(model, Places(tokenizer, TEXTS[:6], answers=answers), **quick)

    components = npeff.decompose(fishers(), n_components=2, n_init=1, progress=False)
    about = Places(padded, TEXTS[:6], answers=[" yes", " no"]).describe()
    assert about["vocabulary"] == components.provenance["fishers"]["places"]["vocabulary"]
    assert components.encode(fishers(tokenizer_of())).coefficients.shape == (6, 2)
    for answers, words in (((" is", " no"), r"\[' is', ' no'\]"), (None, "all tokens")):
        found = rf"fishers: expected the answers of the components, \[' yes', ' no'\], got {words}; compute them"
        with pytest.raises(ArgumentError, match=found):
            components.encode(fishers(answers=answers))
    found = "fishers: expected the tokens of the components' tokenizer, 'model', got those of one without"
    with pytest.raises(ArgumentError, match=found):
        components.encode(fishers(other))
    described = components.provenance["fishers"]["places"]
    described.pop("vocabulary")  # as older files have it
    assert components.encode(fishers()).coefficients.shape == (6, 2)


def test_other_places_are_mended_where_positions_are_given(folder: Path) -> None:
    model, tokenizer = model_of("llama"), tokenizer_of()
    places, turned = (Places(tokenizer, texts, "The") for texts in (TEXTS[:4], TEXTS[3::-1]))
    fishers = npeff.compute_fishers(model, places, rank=1, progress=False)
    components = npeff.decompose(fishers, n_components=1, n_init=1, progress=False)
    with pytest.raises(DataError, match="data: these places are not those that the Fishers were computed from"):
        npeff.mend(model, turned, components, 0, progress=False)
    assert npeff.mend(model, turned, components, 0, repair=range(3), iterations=1, progress=False).n_repair
    with pytest.raises(DataError, match="labels: mending needs all of them, and 4 are unknown"):
        npeff.mend(model, Places(tokenizer, TEXTS[:4]), components, 0, repair=range(3), progress=False)


def test_no_other_places_move_a_model(folder: Path) -> None:
    places = Places(tokenizer_of(), TEXTS)
    model, options = model_of("llama"), {"magnitude": 0.1, "n_random": 0, "curve": 0, "progress": False}
    fishers = npeff.compute_fishers(model, places, rank=1, compress=npeff.Sketch(64), progress=False)
    components = npeff.decompose(fishers, n_components=1, n_init=1, progress=False)
    larger, ending = tokenizer_of(), tokenizer_of(end=True)
    larger.add_tokens(["Zanzibar"])
    others = "data: these places are not those that the Fishers were computed from"
    too_many = "tokenizer: it has 334 tokens, and LlamaForCausalLM embeds 333"
    for data, error, words in (
        (Places(tokenizer_of(), TEXTS[::-1]), DataError, others),
        (Places(ending, TEXTS), DataError, others),
        (Places(larger, TEXTS), ArgumentError, too_many),
    ):
        with pytest.raises(error, match=words):
            components.recover(model, data, progress=False)
        with pytest.raises(error, match=words):
            npeff.perturb(model, data, components, 0, **options)
    news = Places(larger, ["The sky is Zanzibar. It is."], "every")
    with pytest.raises(ArgumentError, match=f"unrelated: {too_many}"):
        npeff.perturb(model, places, components, 0, unrelated=news, **options)

    class Batches(list[Any]):
        tokenizer = larger

    for more in ({"prompts": ["Zanzibar"]}, {"unrelated": ["Zanzibar is"]}):
        with pytest.raises(ArgumentError, match=f"{next(iter(more))}: {too_many}"):
            npeff.perturb(model, Batches(places), components, 0, **options, **more)

    told = []
    for tokenizer in (tokenizer_of(), ending):
        Batches.tokenizer = tokenizer
        effect = npeff.perturb(model, Batches(places), components, 0, prompts=["The sky is"], n_tokens=2, **options)
        told += effect.continuations
    assert told[0] == told[1], "tokens put after a text are not continued"


def test_continuations_end_with_the_models_length(folder: Path) -> None:
    model = model_of("gpt2")
    tokenizer = tokenizer_of()
    places = Places(tokenizer, TEXTS)
    fishers = npeff.compute_fishers(model, places, rank=1, progress=False)
    components = npeff.decompose(fishers, n_components=1, n_init=1, progress=False)
    options: dict[str, Any] = {"magnitude": 0.1, "n_random": 0, "curve": 0, "n_resamples": 0, "progress": False}
    effect = npeff.perturb(model, places, components, 0, prompts=[" yes" * 60], n_tokens=20, **options)
    (told,) = effect.continuations
    assert told.prompt == " yes" * 60 and told.base is not None
    for prompt, words in ((" yes" * 65, "65 tokens, more than GPT2LMHeadModel was made for"), ("\ud800", "fails on")):
        with pytest.raises(DataError, match=f"prompts: .*{words}"):
            npeff.perturb(model, places, components, 0, prompts=[prompt], **options)
    with pytest.raises(DataError, match="unrelated: none of its labels is known, and perplexity is of labels"):
        npeff.perturb(model, places, components, 0, unrelated=Places(tokenizer, TEXTS), **options)


def test_models_that_do_not_fit(folder: Path) -> None:
    places = Places(tokenizer_of(), TEXTS[:2])
    with pytest.raises(ArgumentError, match=r"tokenizer: it has .* tokens, and LlamaForCausalLM embeds 300"):
        npeff.compute_fishers(model_of(vocab_size=300), places, progress=False)
    with pytest.raises(ArgumentError, match=r"texts: text 0 has .* was made for at most 4; cut the text"):
        npeff.compute_fishers(model_of(max_position_embeddings=4), places, progress=False)
    with pytest.raises(DataError, match=r"logits: .* got BaseModelOutputWithPast; load it with its head"):
        npeff.compute_fishers(model_of().model, places, progress=False)  # type: ignore[arg-type]


def test_places_of_a_callable_are_not_found_again(folder: Path) -> None:
    places = Places(tokenizer_of(Path("model")), TEXTS, lambda text, tokens: [0])
    described = json.loads(json.dumps(places.describe()))
    with pytest.raises(ArgumentError, match="where: these places were found by a callable"):
        Places.described(described, TEXTS)
