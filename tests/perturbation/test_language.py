"""Perturbation of a language model: texts, labels and predictions against a plain computation in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.language import Places
from npeff.models.parameters import Parameters
from tiny_language import model_of, tokenizer_of

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 40, 7
NAMES = ("input_ids", "attention_mask", "labels")
QUICK: dict[str, Any] = {"n_random": 0, "curve": 0, "n_resamples": 0, "progress": False, "top": 4}


class Letters:
    """A tokenizer of one token a letter."""

    pad_token_id, eos_token_id = None, None

    def __call__(self, text: str, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        ids = torch.tensor([[ord(letter) % VOCABULARY for letter in text]]).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids.tolist()))


class Data(list[Any]):
    """Batches that know their tokenizer."""

    tokenizer = Letters()


def last_token(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=batch["input_ids"]).logits[:, -1]


def next_tokens(n: int, seed: int, size: int = 5) -> Data:
    """Batches of random sequences, each with a label for its last position."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (n, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (n,), generator=generator)
    return Data({"input_ids": ids[i : i + size], "labels": labels[i : i + size]} for i in range(0, n, size))


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return model.double().eval()  # type: ignore[no-any-return]


def components_along(model: nn.Module, labels: torch.Tensor, r: int = 3, within: Any = None) -> Components:
    """Random directions in the layers, with random coefficients."""
    generator = np.random.default_rng(1)
    parameters = Parameters.of(
        (n, tuple(p.shape)) for n, p in model.named_parameters() if n in (within or n) and (within or "layers" in n)
    )
    G = generator.normal(size=(r, parameters.n_parameters)).astype(np.float32)
    return Components(
        kind="low_rank",
        coefficients=generator.random((len(labels), r)).astype(np.float32),
        vectors=G / np.linalg.norm(G, axis=1, keepdims=True),
        columns=None,
        block_weights=None,
        parameters=parameters,
        labels=labels.numpy(),
        logits=np.zeros((len(labels), 0), np.float32),
        ids=np.arange(len(labels)),
        norms=np.ones(len(labels), np.float32),
        loss_curve=np.zeros(1),
        loss=0.0,
        provenance={},
    )


def places(lengths: list[list[int]], side: str, seed: int) -> Data:
    """Batches of padded sequences, every second token of which has the next one as its label."""
    generator = torch.Generator().manual_seed(seed)
    data = Data()
    for own in lengths:
        ids, mask = torch.zeros(2, len(own), max(own)).long()
        labels = torch.full_like(ids, -100)
        for row, length in enumerate(own):
            where = slice(length) if side == "right" else slice(max(own) - length, None)
            tokens = torch.randint(1, VOCABULARY, (length + 1,), generator=generator)
            ids[row, where], mask[row, where] = tokens[:-1], 1
            labels[row, where] = torch.where(torch.arange(length) % 2 == 1, tokens[1:], -100)
        labels[0, -1] = -1 if side == "left" else labels[0, -1]  # a place without a label
        position = (mask.cumsum(1) - 1).clamp_min(0)
        data.append({"input_ids": ids, "attention_mask": mask, "position_ids": position, "labels": labels})
    return data


def at_places(model: nn.Module, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and labels of all places, one sequence after the other."""
    found, labels = [], []
    with torch.no_grad():
        for batch in data:
            for row in range(len(batch["input_ids"])):
                kept = batch["attention_mask"][row].bool()
                logits = model(input_ids=batch["input_ids"][row, kept][None]).logits[0]
                own = batch["labels"][row, kept]
                found.append(torch.log_softmax(logits[own != -100], 1))
                labels.append(own[own != -100])
    return torch.cat(found), torch.cat(labels)


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Data, Components, Data]:
    model, data = llama(), next_tokens(18, seed=2)
    components = components_along(model, torch.cat([batch["labels"] for batch in data]))
    return model, data, components, next_tokens(9, seed=3)


def log_p(model: nn.Module, data: Data) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(torch.cat([last_token(model, batch) for batch in data]), 1)


def of_label(log_p: torch.Tensor, data: Data) -> np.ndarray:
    labels = torch.cat([batch["labels"] for batch in data])
    return log_p[torch.arange(len(labels)), labels].numpy()


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_measured_is_what_a_plain_computation_gives(case: Any, monkeypatch: Any, kept: bool) -> None:
    model, data, components, unrelated = case
    if not kept:
        monkeypatch.setattr("npeff.perturbation.evaluate.OWN_BYTES", 3000)  # groups of two batches
        monkeypatch.setattr("npeff.perturbation.outputs.MOST_NUMBERS", 2 * VOCABULARY)  # two examples at a time
    options = {**QUICK, "curve": 3, "n_random": 1}
    effect = npeff.perturb(
        model, data, components, 1, target_kl=0.3, unrelated=unrelated, forward=last_token, **options
    )
    assert effect.reached and effect.kl[effect.top].mean() == pytest.approx(0.3, rel=0.02)
    before, news = log_p(model, data), of_label(log_p(model, unrelated), unrelated)
    direction = components.state_dict(1)
    for side in effect.sign_results:
        with npeff.applied(model, direction, side.sign * side.magnitude):
            after, moved = log_p(model, data), of_label(log_p(model, unrelated), unrelated)
        assert side.label_top == pytest.approx(np.exp(of_label(after, data))[effect.top].mean(), rel=1e-5)
        assert side.perplexity == pytest.approx(np.exp(-moved.mean()), rel=1e-5)
        if not side.kept:
            continue
        np.testing.assert_allclose(effect.kl, (after.exp() * (after - before)).sum(1), rtol=1e-4)
        np.testing.assert_allclose(effect.label_before, np.exp(of_label(before, data)), rtol=1e-6)
        np.testing.assert_allclose(effect.label_after, np.exp(of_label(after, data)), rtol=1e-5)
        assert effect.perplexity == pytest.approx((np.exp(-news.mean()), np.exp(-moved.mean())), rel=1e-5)
        assert effect.figures["perplexity_ratio"].value == pytest.approx(np.exp((news - moved).mean()), rel=1e-5)
        assert sorted(one.id for one in effect.predictions) == effect.ids[effect.top].tolist()
        assert (np.diff([effect.coefficient[one.id] for one in effect.predictions]) <= 0).all()
        for one in effect.predictions:
            own, moved_to = before[one.id].exp(), after[one.id].exp()
            np.testing.assert_array_equal(one.classes, torch.maximum(own, moved_to).topk(32).indices)
            np.testing.assert_allclose(one.before, own[one.classes], rtol=1e-6)
            np.testing.assert_allclose(one.after, moved_to[one.classes], rtol=1e-5)
    assert effect.curve is not None
    with npeff.applied(model, direction, -effect.curve.magnitudes[1, 2]):
        assert effect.curve.perplexity[1, 2] == pytest.approx(
            np.exp(-of_label(log_p(model, unrelated), unrelated).mean()), rel=1e-5
        )
        assert effect.curve.label_top[1, 2] == pytest.approx(
            np.exp(of_label(log_p(model, data), data))[effect.top].mean(), rel=1e-5
        )
    assert all(math.isfinite(control.values["perplexity_ratio"][0]) for control in effect.controls.values())
    table = effect.table()
    assert f"perplexity on unrelated data: {effect.perplexity[0]:.4g} → {effect.perplexity[1]:.4g}" in table
    assert "probability of the label on the top examples" in table
    assert (
        json.loads(json.dumps(effect.to_json()))["predictions"][0]["classes"] == effect.predictions[0].classes.tolist()
    )


def test_a_strategy_averages_what_its_directions_do(case: Any) -> None:
    model, data, components, unrelated = case
    both = Strategy((0, 2), components.coefficients[:, [0, 2]].sum(1))
    effect = npeff.perturb(
        model, data, components, both, magnitude=0.5, sign=1, unrelated=unrelated, forward=last_token, **QUICK
    )
    shares = components.coefficients[:, [0, 2]].sum(0) / components.coefficients[:, [0, 2]].sum()
    p, news = 0.0, 0.0
    for share, j in zip(shares, (0, 2), strict=True):
        with npeff.applied(model, components.state_dict(j), 0.5):
            p = p + share * log_p(model, data).exp()
            news = news - share * of_label(log_p(model, unrelated), unrelated)
    np.testing.assert_allclose(effect.label_after, of_label(p, data), rtol=1e-5)
    assert effect.perplexity[1] == pytest.approx(np.exp(np.mean(news)), rel=1e-5)
    for one in effect.predictions:
        np.testing.assert_allclose(one.after, p[one.id][one.classes], rtol=1e-5)


def greedily(model: nn.Module, ids: torch.Tensor, n: int) -> str:
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return Letters().decode(ids[0, start:])


@pytest.mark.parametrize("strategy", [False, True])
def test_prompts_are_continued_down_and_up(case: Any, strategy: bool) -> None:
    model, data, components, _ = case
    prompts, members = ["the sea", "a"], (0, 2) if strategy else (1,)
    mass = components.coefficients[:, list(members)]
    j = Strategy(members, mass.sum(1)) if strategy else 1
    options = {"magnitude": 0.9, "n_tokens": 6, "forward": last_token, **QUICK}
    effect = npeff.perturb(model, data, components, j, prompts=prompts, **options)
    top = effect.ids[effect.top]
    up, change = {}, {}
    for k, share in zip(members, mass.sum(0) / mass.sum(), strict=True):
        label = {}
        for sign in (1, -1):
            with npeff.applied(model, components.state_dict(k), 0.9 * sign):
                label[sign] = np.exp(of_label(log_p(model, data), data))[top].mean()
        up[k] = max(label, key=lambda sign: label[sign])
        for name, part in components.state_dict(k).items():
            change[name] = change.get(name, 0) + 0.9 * share * up[k] * part
    assert [told.prompt for told in effect.continuations] == [
        Letters().decode(Letters()(t)["input_ids"][0]) for t in prompts
    ]
    for told, text in zip(effect.continuations, prompts, strict=True):
        for step, found in ((0, told.base), (1, told.up), (-1, told.down)):
            with npeff.applied(model, change, step):
                assert found == greedily(model, Letters()(text)["input_ids"], 6)
    told = effect.continuations[0]
    assert f"up: {told.up!r}" in effect.table()
    assert effect.to_json()["continuations"][0] == {
        "id": None,
        **{n: getattr(told, n) for n in ("prompt", "base", "down", "up")},
    }


def test_the_top_examples_own_texts_are_continued(case: Any) -> None:
    model, data, components, _ = case
    options = {"magnitude": 0.9, "n_tokens": 4, "forward": last_token, **QUICK}
    effect = npeff.perturb(model, data, components, 1, prompts=2, sign=1, **options)
    largest = np.argsort(-components.coefficients[:, 1])[:2].tolist()
    assert [told.id for told in effect.continuations] == largest
    ids = torch.cat([batch["input_ids"] for batch in data])
    rises = effect.label_after[effect.top].mean() > effect.label_before[effect.top].mean()
    for told in effect.continuations:
        assert told.prompt == Letters().decode(ids[told.id])
        assert told.base == greedily(model, ids[told.id : told.id + 1], 4)
        with npeff.applied(model, components.state_dict(1), 0.9):
            assert (told.up if rises else told.down) == greedily(model, ids[told.id : told.id + 1], 4)
        assert (told.down if rises else told.up) is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_places_are_examples(side: str) -> None:
    model, lengths = llama(), [[7, 4, 6], [5, 5], [8]]
    data, news = places(lengths, side, seed=4), places([[6, 3], [9]], side, seed=5)
    before, labels = at_places(model, data)
    own, words = at_places(model, news)
    components = components_along(model, labels)
    effect = npeff.perturb(
        model, data, components, 1, target_kl=0.2, baseline=9, unrelated=news, prompts=2, n_tokens=3, **QUICK
    )
    assert effect.reached
    change = {name: effect.sign * effect.magnitude * part for name, part in components.state_dict(1).items()}
    with npeff.applied(model, change):
        after, _ = at_places(model, data)
        moved, _ = at_places(model, news)
    known, ids = words >= 0, effect.ids
    np.testing.assert_allclose(effect.kl, (after.exp() * (after - before)).sum(1)[ids], rtol=1e-4)
    for found, expected in ((effect.label_before, before), (effect.label_after, after)):
        of = expected.exp()[torch.arange(len(labels)), labels.clamp_min(0)]
        np.testing.assert_allclose(found, torch.where(labels >= 0, of, torch.nan)[ids], rtol=1e-4)
    perplexities = [math.exp(-float(p[known, words[known]].mean())) for p in (own, moved)]
    assert effect.perplexity == pytest.approx(perplexities, rel=1e-4)
    for one in effect.predictions:
        np.testing.assert_allclose(one.after, after[one.id].exp()[one.classes], rtol=1e-4)
    rows = [(ids, mask, row) for b in data for ids, mask, row in zip(*(b[n] for n in NAMES), strict=True)]
    prefixes = [ids[: p + 1][mask[: p + 1].bool()] for ids, mask, row in rows for p in (row != -100).nonzero()[:, 0]]
    for told in effect.continuations:
        assert told.id is not None
        assert told.prompt == Letters().decode(prefixes[told.id])
        assert told.base == greedily(model, prefixes[told.id][None], 3)
    small = npeff.perturb(model, data, components, 1, magnitude=1e-3, baseline="all", **QUICK)
    assert small.details["fisher_norm_found_by"] == "forward mode"
    assert small.details["fisher_norm"] == pytest.approx(2e6 * small.kl.mean(), rel=1e-2)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma2", "mamba"])
def test_texts_are_read_with_the_tokenizer_of_the_data(kind: str) -> None:
    model, tokenizer = model_of(kind).double(), tokenizer_of()
    news = ["The sky is green. Is it?", "no"]
    data = Places(tokenizer, [f"The capital of {name} is" for name in ("France", "Spain", "the sky", "grass")])
    names = [name for name, p in model.named_parameters() if "layers" in name or ".h." in name]
    components = components_along(model, torch.from_numpy(data.labels), r=2, within=names)
    effect = npeff.perturb(
        model, data, components, 1, magnitude=2.0, unrelated=news, prompts=[news[0]], n_tokens=3, **QUICK
    )
    told = {}
    for step in (0.0, effect.sign * effect.magnitude):
        with npeff.applied(model, components.state_dict(1), step), torch.no_grad():
            surprise = []
            for text in news:
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1], 1)
                surprise += (-log_p[torch.arange(len(log_p)), ids[0, 1:]]).tolist()
            told[step] = math.exp(np.mean(surprise))
    assert effect.perplexity == pytest.approx(list(told.values()), rel=1e-4)
    (one,) = effect.continuations
    assert one.prompt == news[0] and one.id is None
    if kind != "mamba":  # which has no longest text
        with pytest.raises(npeff.ArgumentError, match=r"unrelated: texts: text 0 has .* tokens"):
            npeff.perturb(model, data, components, 1, unrelated=["no " * 70], **QUICK)


def test_trace_mend_and_diagonal_components_take_places() -> None:
    model, data = llama(), places([[7, 4, 6], [5, 5], [8]], "right", seed=4)
    before, labels = at_places(model, data)
    components = components_along(model, labels)
    options = {"magnitude": 0.5, "sign": 1, "top": 4, "n_resamples": 0, "progress": False}
    effect = npeff.perturb(model, data, components, 1, n_random=0, curve=0, **options)
    trace = npeff.trace(model, data, components, 1, **options)
    np.testing.assert_allclose(trace.kl, effect.kl[np.searchsorted(effect.ids, trace.ids)], rtol=1e-6)
    mending = npeff.mend(model, data, components, [0, 1, 2], repair=range(6), tolerance=1.0, progress=False)
    right = before.argmax(1) == labels
    assert mending.n_repair + mending.n_others == len(labels)
    assert mending.accuracy[0] == pytest.approx(float(right[6:].double().mean()))
    with npeff.applied(model, mending.change):
        after = at_places(model, data)[0]
    assert mending.repaired[1] == pytest.approx(float((after.argmax(1) == labels)[:6].double().mean()))
    diagonal = replace(components, kind="diagonal", vectors=np.abs(components.vectors))
    effect = npeff.perturb(model, data, diagonal, 1, target_kl=0.1, **QUICK)
    assert effect.reached
    assert torch.equal(before, at_places(model, data)[0])


def test_predictions_restricted_to_answers_are_measured_and_mended_as_such() -> None:
    """KL, probabilities and repair are those of the softmax over the answers; unrelated texts have all tokens."""
    model, tokenizer = model_of("llama").double(), tokenizer_of()
    texts = [f"Is {name} {kind}?" for name in ("it", "grass", "the sky", "France") for kind in ("good", "bad", "green")]
    rows = [{"text": text, "label": [" yes", " no"][i % 2]} for i, text in enumerate(texts)]
    data, news = Places(tokenizer, rows, answers=[" yes", " no"], label_column="label"), ["The sky is green."]
    labels = torch.from_numpy(data.labels)
    components = components_along(model, labels, r=2)
    answers = [tokenizer(word)["input_ids"][0] for word in (" yes", " no")]

    def measured() -> tuple[torch.Tensor, float]:
        found = [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1, answers] for text in texts]
        ids = torch.tensor([tokenizer(news[0])["input_ids"]])
        log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1], 1)
        return torch.log_softmax(torch.stack(found), 1), float(-log_p[torch.arange(len(log_p)), ids[0, 1:]].mean())

    options = {**QUICK, "magnitude": 2.0, "sign": 1}
    effect = npeff.perturb(model, data, components, 0, unrelated=news, **options)
    trace = npeff.trace(model, data, components, 0, magnitude=2.0, sign=1, top=4, n_resamples=0, progress=False)
    with torch.no_grad():
        before, own = measured()
        with npeff.applied(model, components.state_dict(0), 2.0):
            after, moved = measured()
    kl = (after.exp() * (after - before)).sum(1)
    np.testing.assert_allclose(effect.kl, kl, rtol=1e-4)
    np.testing.assert_allclose(trace.kl, kl[trace.ids], rtol=1e-4)
    np.testing.assert_allclose(effect.label_after, after[torch.arange(12), labels].exp(), rtol=1e-5)
    assert effect.perplexity == pytest.approx((math.exp(own), math.exp(moved)), rel=1e-5)
    assert effect.predictions[0].before.sum() == pytest.approx(1) and len(effect.predictions[0].classes) == 2
    wrong = np.flatnonzero(before.argmax(1) != labels)
    mending = npeff.mend(model, data, components, [0, 1], repair=wrong, tolerance=1.0, progress=False)
    with torch.no_grad(), npeff.applied(model, mending.change):
        right = (measured()[0].argmax(1) == labels).numpy()
    assert not mending.held_out and mending.repaired == (0.0, pytest.approx(right[wrong].mean()))
    assert mending.accuracy == (1.0, pytest.approx(np.delete(right, wrong).mean()))


def test_bad_texts_are_told(case: Any) -> None:
    model, data, components, unrelated = case

    def call(given: Any = data, **options: Any) -> None:
        npeff.perturb(model, given, components, 0, magnitude=0.1, forward=last_token, **QUICK, **options)

    beyond = [{**unrelated[0], "labels": torch.tensor([1, 2, 3, VOCABULARY, 4])}]
    for options, error, text in (
        (
            {"unrelated": ["news"], "given": list(data)},
            npeff.ArgumentError,
            "unrelated: got texts, and the data has no",
        ),
        ({"unrelated": "no.txt"}, npeff.ArgumentError, "unrelated: texts: there is no file no.txt"),
        ({"unrelated": 3}, npeff.ArgumentError, "expected an iterable of batches"),
        ({"unrelated": []}, npeff.DataError, "unrelated: it yielded no batches"),
        ({"unrelated": [{"input_ids": torch.ones(2, 3).long()}]}, npeff.DataError, "unrelated: its batches have no"),
        ({"unrelated": beyond}, npeff.DataError, f"unrelated: expected labels below {VOCABULARY}.*got {VOCABULARY}"),
        ({"prompts": ["a text", 3]}, npeff.ArgumentError, "prompts: expected a list of texts"),
        ({"prompts": [""]}, npeff.DataError, "prompts: '' has no tokens"),
        ({"prompts": ["a"], "given": list(data)}, npeff.ArgumentError, "prompts: the data has no tokenizer"),
        ({"prompts": ["a"], "n_tokens": 0}, npeff.ArgumentError, "n_tokens"),
    ):
        with pytest.raises(error, match=text):
            call(**options)
    with pytest.raises(npeff.ArgumentError, match="unrelated: a trace has no such option"):
        npeff.trace(model, data, components, 0, unrelated=unrelated)
    plain = nn.Sequential(nn.Linear(3, 4)).eval()
    parameters = Parameters.of((name, tuple(p.shape)) for name, p in plain.named_parameters())
    vectors = np.ones((3, parameters.n_parameters), np.float32)
    other = replace(components, parameters=parameters, vectors=vectors, logits=np.zeros((18, 0), np.float32))
    with pytest.raises(npeff.ArgumentError, match=r"prompts: Sequential has no generate\(\)"):
        npeff.perturb(plain, Data([torch.ones(18, 3)]), other, 0, magnitude=0.1, prompts=["a"], **QUICK)
