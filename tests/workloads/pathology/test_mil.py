"""Each model against its paper's formulas, written out in numpy; bags do not know their padding."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from permed_compute.workloads.pathology import mil  # noqa: E402

DIM, HIDDEN, OUTPUTS = 6, 16, 3


def made(model: str, attention: int = 5) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    torch.manual_seed(1)
    definition = {
        "model": model,
        "dim": DIM,
        "outputs": OUTPUTS,
        "hidden": HIDDEN,
        "attention": attention,
        "dropout": 0.3,
    }
    module = mil.build(definition).eval()
    return module, {name: value.double().numpy() for name, value in module.state_dict().items()}


def bag(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def answer(module: torch.nn.Module, x: np.ndarray, label: int | None = None) -> mil.Answer:
    with torch.no_grad():
        told = None if label is None else torch.tensor([label])
        return module(torch.from_numpy(x)[None], torch.ones(1, len(x), dtype=torch.bool), told)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def linear(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def pooled(w: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ilse et al., eq. 9 and 7: embedded tiles, a_k, and z = Σ a_k h_k."""
    h = np.maximum(linear(w, "embed.0", x), 0)
    score = linear(w, "attend.w", np.tanh(linear(w, "attend.v", h)) * sigmoid(linear(w, "attend.u", h)))[:, 0]
    a = softmax(score)
    return h, a, a @ h


@pytest.mark.parametrize("model", ["abmil", "clam-sb"])
def test_gated_attention_is_the_papers(model: str) -> None:
    module, w = made(model)
    x = bag(23)
    _, a, z = pooled(w, x)
    found = answer(module, x)
    assert np.allclose(found.attention[0], a, atol=1e-6)
    assert np.allclose(found.logits[0], linear(w, "answer", z), atol=1e-5) and found.instance_loss is None


def test_clams_instances_are_clustered_as_the_paper_says() -> None:
    """The eight tiles of highest attention are of the bag's class and the eight of lowest are not; to classes that are
    excluded by it, the eight of highest are not."""
    module, w = made("clam-sb")
    x = bag(30)
    h, a, _ = pooled(w, x)
    order = np.argsort(a)
    wanted = []
    for k in range(OUTPUTS):
        rows, truth = list(order[-8:]), [1 if k == 2 else 0] * 8
        if k == 2:
            rows, truth = rows + list(order[:8]), truth + [0] * 8
        s = linear(w, f"instances.{k}", h[rows])
        losses = [  # smooth top-1 SVM: log Σ_j exp(s_j + [j ≠ y]) − s_y
            math.log(sum(math.exp(s[i, j] + (j != y)) for j in range(2))) - s[i, y] for i, y in enumerate(truth)
        ]
        wanted.append(np.mean(losses))
    found = answer(module, x, label=2)
    assert float(found.instance_loss) == pytest.approx(np.mean(wanted), rel=1e-5)


# ------------------------------------------------------------------------------------------------ TransMIL


def normed(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * w[f"{name}.weight"] + w[f"{name}.bias"]


def nystrom(w: dict[str, np.ndarray], name: str, x: np.ndarray, landmarks: int) -> tuple[np.ndarray, np.ndarray]:
    """Xiong et al., eq. 13, head by head: softmax(Q K̃ᵀ) Z* softmax(Q̃ Kᵀ) V, and a depthwise convolution over V."""
    n, size = len(x), HIDDEN // 8
    qkv = linear(w, f"{name}.qkv", x).reshape(n, 3, 8, size)
    heads, rows = [], []
    for head in range(8):
        q, k, v = (qkv[:, part, head] for part in range(3))
        q = q / math.sqrt(size)
        if n <= landmarks:
            weights = softmax(q @ k.T)
        else:
            ends = [(i * n // landmarks, -(-(i + 1) * n // landmarks)) for i in range(landmarks)]
            ql, kl = (np.stack([part[a:b].mean(0) for a, b in ends]) for part in (q, k))
            among = softmax(ql @ kl.T)
            z = among.T / (np.abs(among).sum(0).max() * np.abs(among).sum(1).max())
            one = np.eye(landmarks)
            for _ in range(6):
                az = among @ z
                z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
            weights = softmax(q @ kl.T) @ z @ softmax(ql @ k.T)
        kernel, padded = w[f"{name}.near.weight"][head, 0], np.pad(v, ((16, 16), (0, 0)))
        near = np.stack([(kernel[:, None] * padded[i : i + 33]).sum(0) for i in range(n)])
        heads.append(weights @ v + near)
        rows.append(weights[0])
    return linear(w, f"{name}.out.0", np.concatenate(heads, 1)), np.mean(rows, 0)


def ppeg(w: dict[str, np.ndarray], tiles: np.ndarray, side: int) -> np.ndarray:
    square = tiles.reshape(side, side, HIDDEN)
    total = square.copy()
    for number, edge in enumerate((7, 5, 3)):
        kernel, half = w[f"position.convolutions.{number}.weight"], edge // 2
        padded = np.pad(square, ((half, half), (half, half), (0, 0)))
        for i in range(side):
            for j in range(side):
                window = padded[i : i + edge, j : j + edge]
                total[i, j] += (window * kernel[:, 0].transpose(1, 2, 0)).sum((0, 1))
        total += w[f"position.convolutions.{number}.bias"]
    return total.reshape(-1, HIDDEN)


def transmil(w: dict[str, np.ndarray], x: np.ndarray, landmarks: int) -> tuple[np.ndarray, np.ndarray]:
    """Shao et al., algorithm 2; attention is the class token's in both layers (decision 108)."""
    h = np.maximum(linear(w, "embed.0", x), 0)
    side = math.ceil(math.sqrt(len(h)))
    h = np.concatenate([w["token"], h, h[: side * side - len(h)]])
    mixed, early = nystrom(w, "layers.0", normed(w, "norms.0", h), landmarks)
    h = h + mixed
    h = np.concatenate([h[:1], ppeg(w, h[1:], side)])
    mixed, late = nystrom(w, "layers.1", normed(w, "norms.1", h), landmarks)
    weights = np.maximum(early[1:], 0) + np.maximum(late[1:], 0)
    weights[: len(weights) - len(x)] += weights[len(x) :]
    weights = weights[: len(x)]
    return linear(w, "answer", normed(w, "norms.2", (h + mixed)[0])), weights / weights.sum()


@pytest.mark.parametrize("landmarks", [64, 5, 4])
@pytest.mark.parametrize("count", [1, 24, 30])
def test_transmil_is_the_papers(landmarks: int, count: int) -> None:
    module, w = made("transmil", landmarks)
    x = bag(count)
    logits, attention = transmil(w, x, landmarks)
    found = answer(module, x)
    assert np.allclose(found.logits[0], logits, atol=2e-4)
    assert np.allclose(found.attention[0], attention, atol=2e-4)


# ------------------------------------------------------------------------------------------------ bags


@pytest.mark.parametrize("model", list(mil.MODELS))
def test_a_bags_answer_does_not_depend_on_its_padding_or_its_neighbours(model: str) -> None:
    module, _ = made(model)
    bags = [bag(12, 1), bag(30, 2), bag(1, 3)]
    x = torch.full((3, 30, DIM), 9.0, dtype=torch.float16)
    mask = torch.zeros(3, 30, dtype=torch.bool)
    for k, own in enumerate(bags):
        x[k, : len(own)], mask[k, : len(own)] = torch.from_numpy(own).half(), True
    with torch.no_grad():
        together = module(x, mask)
    for k, own in enumerate(bags):
        alone = answer(module, own.astype(np.float16))
        assert np.allclose(together.logits[k], alone.logits[0], atol=1e-5)
        assert np.allclose(together.attention[k, : len(own)], alone.attention[0], atol=1e-6)
        assert not together.attention[k, len(own) :].any()
    assert torch.allclose(together.attention.sum(1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize("model", list(mil.MODELS))
def test_every_weight_learns(model: str) -> None:
    module, _ = made(model)
    found = module.train()(torch.randn(2, 9, DIM), torch.ones(2, 9, dtype=torch.bool), torch.tensor([0, 2]))
    (found.logits.pow(2).sum() + (found.instance_loss if found.instance_loss is not None else 0)).backward()
    silent = [name for name, weight in module.named_parameters() if weight.grad is None]
    assert silent == []
