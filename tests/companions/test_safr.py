"""SAFR's losses against plain loops, its hooks on different models, and what training with it does to planted text."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from npeff.companions import safr
from npeff.companions.safr import SAFRRegularizer, VMask
from npeff.errors import ArgumentError, DataError, ModelError
from text_classifier import (
    TransformerClassifier,
    WordVocabulary,
    evaluate,
    mask_auc,
    measure,
    planted,
    train_classifier,
)


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 4, generator=rng, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool()
    x[0, 2] = 0  # a token that the mask dropped
    attention = torch.softmax(torch.randn(3, 2, 5, 5, generator=rng, dtype=torch.float64), -1)
    return x, attention, mask


# ---- losses ------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_importance_loss_is_its_formula(seed: int, cosine: bool) -> None:
    x, _, mask = random_case(seed)
    expected = []
    for b in range(3):
        real = [x[b, i].numpy() for i in range(5) if mask[b, i]]
        unit = [v / np.linalg.norm(v) if v.any() else v for v in real]
        overlaps = [
            np.linalg.norm([u @ (unit if cosine else real)[j] for j in range(len(real)) if j != i])
            for i, u in enumerate(unit)
        ]
        expected.append(np.mean(overlaps) / 2)
    assert float(safr.importance_loss(x, mask, cosine=cosine)) == pytest.approx(np.mean(expected))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_interaction_loss_is_its_formula(seed: int) -> None:
    _, attention, mask = random_case(seed)
    expected = []
    for b in range(3):
        real = np.flatnonzero(mask[b])
        for head in attention[b].numpy():
            A = head[np.ix_(real, real)]
            A = A / A.sum(1, keepdims=True)
            pairs = [A[i, k] * (1 - A[i] @ A[k]) for i in range(len(A)) for k in range(len(A)) if i != k]
            expected.append(np.mean(pairs))
    assert float(safr.interaction_loss(attention, mask)) == pytest.approx(np.mean(expected))


def test_padding_changes_neither_loss_nor_gradient() -> None:
    x, attention, mask = random_case(0)
    wide = torch.cat([x, 9 * torch.ones(3, 2, 4, dtype=x.dtype)], 1).requires_grad_()
    more = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    A = torch.full((3, 2, 7, 7), 0.3, dtype=x.dtype)
    A[:, :, :5, :5] = attention
    assert safr.importance_loss(wide, more).item() == pytest.approx(safr.importance_loss(x, mask).item())
    assert float(safr.interaction_loss(A, more)) == pytest.approx(float(safr.interaction_loss(attention, mask)))
    safr.importance_loss(wide, more).backward()
    assert wide.grad is not None and not wide.grad[~more].any() and torch.isfinite(wide.grad).all()


def test_only_the_cosine_form_ignores_scale() -> None:
    x, _, mask = random_case(0)
    scaled = safr.importance_loss(0.1 * x, mask) / safr.importance_loss(x, mask)
    assert float(scaled) == pytest.approx(0.1)
    same = safr.importance_loss(0.1 * x, mask, cosine=True) / safr.importance_loss(x, mask, cosine=True)
    assert float(same) == pytest.approx(1)
    orthogonal = torch.eye(4).expand(2, 4, 4)
    assert float(safr.importance_loss(orthogonal)) == 0


def test_attention_alike_or_apart_costs_nothing() -> None:
    one = torch.zeros(1, 1, 4, 4)
    one[..., 2] = 1  # all attend to the same token: J = 1
    assert float(safr.interaction_loss(one)) == 0
    assert float(safr.interaction_loss(torch.eye(4)[None, None])) == 0  # nothing correlates: C = 0


def test_a_single_token_has_no_pairs() -> None:
    x, attention, _ = random_case(0)
    mask = torch.tensor([[1, 0, 0, 0, 0]] * 3)
    assert float(safr.importance_loss(x, mask)) == 0 == float(safr.interaction_loss(attention, mask))


# ---- the mask ----------------------------------------------------------------------------------------------


def test_vmask_samples_in_training_and_weighs_in_evaluation() -> None:
    torch.manual_seed(0)
    vmask, e = VMask(8), torch.randn(4, 6, 8)
    hard = vmask.train()(e)
    dropped = (hard == 0).all(-1)
    assert 0 < dropped.sum() < dropped.numel()
    assert torch.allclose(hard[~dropped], e[~dropped])
    hard.square().sum().backward()
    assert vmask.inner.weight.grad is not None and vmask.inner.weight.grad.abs().sum() > 0
    soft = vmask.eval()(e)
    assert torch.allclose(soft, e * vmask.importance(e)[..., None]) and torch.equal(soft, vmask(e))
    assert 0 < float(vmask.entropy(torch.ones(4, 6))) <= np.log(2) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decided_masks_have_a_finite_entropy_in_any_precision(dtype: torch.dtype) -> None:
    vmask = VMask(8).to(dtype)
    nn.init.constant_(vmask.outer.bias[0], 60)  # every token is kept
    vmask(torch.randn(2, 3, 8).to(dtype))
    entropy = vmask.entropy(torch.ones(2, 3))
    entropy.backward()
    assert 0 <= float(entropy) < 0.06 and torch.isfinite(vmask.outer.weight.grad).all()


def test_a_model_with_a_mask_is_copied_in_the_middle_of_training() -> None:
    model, (ids, mask, _) = small(), planted(4, 0)
    with SAFRRegularizer(model, "vmask") as regularizer:
        model(ids, mask)
        regularizer.penalty(mask)
    other = copy.deepcopy(model)
    assert torch.equal(other.eval()(ids, mask), model.eval()(ids, mask))


# ---- hooks -------------------------------------------------------------------------------------------------


def small(dim: int = 16, layers: int = 2) -> TransformerClassifier:
    torch.manual_seed(0)
    return TransformerClassifier(120, dim=dim, heads=2, feedforward=16, layers=layers, length=16, dropout=0.0)


@pytest.mark.parametrize("training", [False, True])
def test_hooks_see_every_layer_and_change_no_output(training: bool) -> None:
    model, (ids, mask, _) = small().train(training), planted(5, 0)
    torch.manual_seed(1)
    plain = model(ids, mask)
    regularizer = SAFRRegularizer(model, "vmask", importance=2.0, interaction=3.0)
    with regularizer:
        torch.manual_seed(1)
        watched = model(ids, mask)
        penalty = regularizer.penalty(mask)
        seen = len(regularizer._weights)  # private: the losses do not say of how many layers they are
        imp, inter = regularizer.losses(mask)
    assert seen == 2
    torch.testing.assert_close(watched, plain, atol=1e-5, rtol=1e-5)
    assert float(penalty) == pytest.approx(float(2 * imp + 3 * inter))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(regularizer.parameters()) == []  # the model's parameters stay its own


def test_attention_callers_get_what_they_asked_for() -> None:
    model = nn.Sequential(nn.Identity())
    model.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    calls = [{}, {"need_weights": False}, {"average_attn_weights": False}]
    plain = [model.attention(x, x, x, **call) for call in calls]
    with SAFRRegularizer(model, "0"):
        watched = [model.attention(x, x, x, **call) for call in calls]
    for (a, weights), (b, ours) in zip(plain, watched, strict=True):
        torch.testing.assert_close(a, b)
        assert (weights is None) == (ours is None)
        if weights is not None:
            torch.testing.assert_close(weights, ours)


def test_a_mask_is_put_into_a_model_without_one() -> None:
    model = small()
    model.vmask = nn.Identity()  # a model that knows no mask
    (ids, mask, _), vmask = planted(5, 0), VMask(16).eval()
    plain = model.eval()(ids, mask)
    regularizer = SAFRRegularizer(model, "embed", vmask=vmask, entropy=0.5)
    with regularizer:
        assert not torch.allclose(model(ids, mask), plain)
        regularizer.penalty(mask).backward()
    assert vmask.inner.weight.grad is not None
    assert set(regularizer.terms) == {"importance", "interaction", "entropy"} and regularizer.terms["entropy"] > 0
    torch.testing.assert_close(model(ids, mask), plain)


def hugging_face(attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="Hugging Face's models need transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=120, max_position_embeddings=32, attn_implementation=attention, **sizes)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def test_hugging_face_models_with_eager_attention() -> None:
    model, (ids, mask, _) = hugging_face("eager"), planted(4, 0)
    regularizer = SAFRRegularizer(model, "bert.embeddings.word_embeddings", vmask=VMask(16))
    with regularizer:
        out = model(input_ids=ids, attention_mask=mask.long(), output_attentions=True)
        regularizer.penalty(mask).backward()
        imp, inter = regularizer.losses(mask)
    expected = torch.stack([safr.interaction_loss(a, mask) for a in out.attentions]).mean()
    torch.testing.assert_close(inter, expected)
    assert float(imp) > 0 and model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_fused_attention_is_refused() -> None:
    model, (ids, mask, _) = hugging_face("sdpa"), planted(4, 0)
    with SAFRRegularizer(model, "bert.embeddings.word_embeddings"), pytest.raises(ModelError, match="eager"):
        model(input_ids=ids, attention_mask=mask.long())
    model(input_ids=ids, attention_mask=mask.long())  # as it was


# ---- bad input ---------------------------------------------------------------------------------------------


def test_bad_input_is_told() -> None:
    model, (ids, mask, _) = small(), planted(4, 0)
    x, attention, ok = random_case(0)
    empty = ok.clone()
    empty[1] = False
    for loss, given_ in ((safr.importance_loss, x), (safr.interaction_loss, attention)):
        with pytest.raises(DataError, match="example 1 of the batch is all padding"):
            loss(given_, empty)
        with pytest.raises(ArgumentError, match=r"mask: expected shape \(3, 5\)"):
            loss(given_, ok[:, :4])
        with pytest.raises(ArgumentError, match="got other values"):
            loss(given_, 2 * ok)
    with pytest.raises(DataError, match="NaN"):
        safr.interaction_loss(attention * float("nan"), ok)
    with pytest.raises(DataError, match="all padding"):
        model(torch.zeros_like(ids))
    with pytest.raises(ArgumentError, match="no module 'embd'; it has 'embed'"):
        SAFRRegularizer(model, "embd")
    with pytest.raises(ModelError, match="no module of the model is"):
        SAFRRegularizer(nn.Sequential(nn.Linear(2, 2)), "0")
    with pytest.raises(ArgumentError, match="importance: expected a finite number ≥ 0"):
        SAFRRegularizer(model, "embed", importance=-1)
    with pytest.raises(ArgumentError, match="needs attention modules"):
        SAFRRegularizer(model, "embed", ())
    with pytest.raises(ArgumentError, match=r"model: expected .*, got str"):
        SAFRRegularizer("model", "embed")
    with pytest.raises(ArgumentError, match="vmask: expected a VMask or None, got Linear"):
        SAFRRegularizer(model, "embed", vmask=nn.Linear(2, 2))
    regularizer = SAFRRegularizer(model, "vmask")
    with pytest.raises(ModelError, match="no embeddings were seen; use it as"):
        regularizer.penalty(mask)
    with SAFRRegularizer(model, "head"), pytest.raises(ModelError, match="float tensor"):
        model(ids, mask)
    for which in ([model.head], model.head):
        with SAFRRegularizer(model, "vmask", which), pytest.raises(ModelError, match="'head'"):
            model(ids, mask)


# ---- the score and the picture -----------------------------------------------------------------------------


def test_score_is_of_directions_and_of_what_shares_them() -> None:
    for vectors in (np.eye(5), torch.eye(5, dtype=torch.bfloat16)):
        assert safr.superposition_score(vectors) == pytest.approx(0)
    pairs = np.repeat(np.eye(3), 2, axis=0)
    assert safr.superposition_score(pairs) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    x, importance = rng.normal(size=(40, 8)), rng.random(40)
    score = safr.superposition_score(x, importance)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert score == pytest.approx(np.average(1 - 1 / np.square(units @ units.T).sum(1), weights=importance))
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert score == pytest.approx(safr.superposition_score(3 * x @ rotation, 7 * importance))
    assert safr.superposition_score(torch.from_numpy(x)) == pytest.approx(40 / 48, abs=0.05)  # V / (V + d)
    only = np.zeros(6)
    only[0] = 1
    assert safr.superposition_score(np.vstack([np.eye(5), np.eye(5)[4]]), only) == pytest.approx(0)


def test_capacity_map_orders_tokens_by_unit() -> None:
    x = np.eye(6)[[0, 3, 0, 3, 5]] + 0.01
    found = safr.capacity_map(x, list("abcde"), [5, 4, 3, 2, 0.1], n_tokens=4, n_units=2)
    assert found.tokens == ["a", "c", "b", "d"] and found.units.tolist() == [0, 3]
    np.testing.assert_allclose(found.shares[:2, 0], 1.01**2 / np.square(x[0]).sum())
    shown = found.figure().axes[0]
    np.testing.assert_array_equal(shown.images[0].get_array(), found.shares)
    assert [tick.get_text() for tick in shown.get_yticklabels()] == ["a  5.00", "c  3.00", "b  4.00", "d  2.00"]
    with pytest.raises(ArgumentError, match="tokens: expected 5 names"):
        safr.capacity_map(x, ["a"])
    with pytest.raises(ArgumentError, match="row 2 is zero"):
        safr.superposition_score(np.array([[1.0, 0], [0, 1], [0, 0]]))


def test_words_become_ids() -> None:
    vocabulary = WordVocabulary.of(["A good film!", "a good, good cast"], least=1)
    assert vocabulary.words[:4] == ("<pad>", "<unknown>", "good", "a")
    ids, mask = vocabulary.encode(["good unseen film", "a"], length=4)
    assert ids[0].tolist()[:2] == [2, 1] and mask.sum(1).tolist() == [3, 1]
    with pytest.raises(DataError, match="text 1 has no word"):
        vocabulary.encode(["a", " … "])


# ---- training ----------------------------------------------------------------------------------------------


def trained(seed: int, **weights) -> tuple[dict[str, float], float]:
    torch.manual_seed(seed)
    model = TransformerClassifier(120, dim=48, heads=4, feedforward=48, length=16, dropout=0.0)
    regularizer = SAFRRegularizer(model, "vmask", **weights)
    splits = [planted(n, 10 * k + seed) for k, n in ((1, 480), (2, 100), (3, 300))]
    options = {"epochs": 6, "learning_rate": 5e-3, "seed": seed, "progress": False}
    train_classifier(model, regularizer, *splits[:2], **options)
    assert not model.training and not any(m._forward_hooks for m in model.modules())
    return measure(model, regularizer, splits[2]), mask_auc(model, splits[2])


def test_regularised_training_of_planted_text_side_by_side() -> None:
    """Each loss falls under its own weight, accuracy stays, the mask finds the planted tokens. Three seeds: slow."""
    _check_side_by_side([0])


@pytest.mark.slow
def test_regularised_training_of_planted_text_over_seeds() -> None:
    _check_side_by_side([0, 1, 2])


def _check_side_by_side(seeds: list[int]) -> None:
    cases = {
        "plain": {"importance": 0.0, "interaction": 0.0},
        "importance": {"importance": 5.0, "interaction": 0.0, "cosine": True},
        "interaction": {"importance": 0.0, "interaction": 10.0},
    }
    runs = {name: [trained(seed, **weights) for seed in seeds] for name, weights in cases.items()}
    mean = {name: {key: np.mean([m[key] for m, _ in found]) for key in found[0][0]} for name, found in runs.items()}
    for key, case in (
        ("importance", "importance"),
        ("importance_cosine", "importance"),
        ("interaction", "interaction"),
    ):
        assert mean[case][key] <= 0.85 * mean["plain"][key], (key, mean)
    for case, found in runs.items():
        assert mean[case]["accuracy"] >= mean["plain"]["accuracy"] - 0.02, mean
        assert np.mean([auc for _, auc in found]) >= 0.75


def test_the_best_weights_come_back_as_they_were() -> None:
    """The weights returned give the history's best validation loss, though training went on past them."""
    torch.manual_seed(0)
    model = small(layers=1)
    regularizer = SAFRRegularizer(model, "vmask", importance=0.1, interaction=0.1)
    train, validation = planted(64, 1), planted(40, 2)
    train[2][:20] = 1 - train[2][:20]  # wrong labels: it overfits soon
    history = train_classifier(
        model, regularizer, train, validation, epochs=12, patience=2, learning_rate=2e-2, entropy=0.0, progress=False
    )
    assert history.best < len(history.accuracy) - 1  # it did go on
    assert evaluate(model, validation)[0] == pytest.approx(history.validation_loss[history.best], rel=1e-5)
    assert history.validation_loss[history.best] == min(history.validation_loss)
    by_accuracy = train_classifier(
        model,
        regularizer,
        train,
        validation,
        epochs=4,
        learning_rate=2e-2,
        entropy=0.0,
        keep="accuracy",
        progress=False,
    )
    assert evaluate(model, validation)[1] == pytest.approx(max(by_accuracy.accuracy))
    with pytest.raises(ArgumentError, match="keep: expected 'loss' or 'accuracy', got 'best'"):
        train_classifier(model, regularizer, train, validation, keep="best")
    with pytest.raises(ArgumentError, match="epochs"):
        train_classifier(model, regularizer, train, validation, epochs=0)
