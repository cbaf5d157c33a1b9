"""Dense layers that share their weights, such as heads tied to the embedding."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import families

from cpumoe.cli import host_threads
from cpumoe.integrations.transformers import ExpertsOptions, dense, from_pretrained
from cpumoe.integrations.transformers.model_speed import dense_bytes
from cpumoe.integrations.transformers.shared_dense import SharedLinear

OPTIONS = ExpertsOptions(dense="native", progress=False)
TOKENS, WIDTH = 100, 72
PROMPT = torch.arange(3, 27)[None]


@pytest.fixture(autouse=True)
def _tiny_layers_count(monkeypatch):
    monkeypatch.setattr(dense, "_LEAST_BYTES", 0)


class Model(nn.Module):
    """An embedding, and a head that shares its weights."""

    def __init__(self, dtype=torch.bfloat16, *, bias=False, head=nn.Linear):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.head = head(WIDTH, TOKENS, bias=bias)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            self.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
        self.to(dtype).requires_grad_(False)

    def forward(self, input_ids, **_):
        return self.head(self.embedding(input_ids))


class Derived(nn.Linear):
    pass


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tied_head_reads_the_embeddings_weights(dtype):
    model = Model(dtype)
    host = copy.deepcopy(model)
    weight = model.embedding.weight
    done = dense.swap_dense(model, OPTIONS)
    assert done.ours == ["head"]
    assert not done.hosts
    assert type(model.head) is SharedLinear
    assert model.head.weight is model.embedding.weight is weight
    assert [*model.state_dict()] == [*host.state_dict()]
    for shape in ((WIDTH,), (0, WIDTH), (1, WIDTH), (1, 1, WIDTH), (3, WIDTH), (2, 2, WIDTH)):
        x = random(*shape).to(dtype)
        expected = x.double() @ weight.double().T
        result = model.head(x)
        assert result.dtype == dtype
        assert result.shape == host.head(x).shape
        error, hosts = ((y.double() - expected).norm() for y in (result, host.head(x)))
        assert error <= 1.01 * hosts + 1e-6 * expected.norm()
    many = random(70, WIDTH).to(dtype)
    assert torch.equal(model.head(many), host.head(many))  # is the host's
    with torch.no_grad():
        weight.mul_(2)  # a change counts at once
        host.embedding.weight.mul_(2)
    x = random(1, WIDTH).to(dtype)
    torch.testing.assert_close(model.head(x), host.head(x))


def test_pytorch_computes_what_needs_more_than_the_result():
    model = Model(torch.float32)
    host = copy.deepcopy(model)
    assert dense.swap_dense(model, OPTIONS).ours
    results = []
    for each in (model, host):
        each.requires_grad_()
        x = random(2, WIDTH).requires_grad_()
        each.head(x).square().sum().backward()
        results.append((x.grad, each.head.weight.grad))
    torch.testing.assert_close(results[0], results[1])
    with torch.no_grad():
        x = random(1, WIDTH)
        compiled = torch.compile(model.head, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), host.head(x))
        assert model.head(x.to("meta").bfloat16().float()).is_meta
        twin = copy.deepcopy(model)
        assert twin.head.weight is twin.embedding.weight
        torch.testing.assert_close(twin.head(x), host.head(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Model(bias=True), "it has a bias and shares its weights with another module"),
        (Model(head=Derived), "it is a Derived that shares its weights with another module"),
        (
            Model(torch.float16),
            "it shares its weights with another module, and they are float16 on cpu",
        ),
    ],
)
def test_other_shared_layers_stay_the_hosts(model, reason):
    own = type(model.head)
    assert dense.swap_dense(model, OPTIONS).hosts == {"head": reason}
    assert type(model.head) is own


def test_small_shared_layers_stay_the_hosts(monkeypatch):
    monkeypatch.setattr(dense, "_LEAST_BYTES", 64 << 10)
    done = dense.swap_dense(Model(), OPTIONS)
    assert done.hosts == {"head": f"its weights have only {TOKENS * WIDTH * 2} bytes"}


@pytest.mark.parametrize("family", ["ernie4_5_moe", "gemma4"])
def test_a_model_with_a_tied_head(tmp_path, family):
    model = families.tiny_model(family)
    assert model.config.tie_word_embeddings
    model.bfloat16().save_pretrained(tmp_path)
    loaded = {
        chosen: from_pretrained(
            tmp_path, dtype=torch.float32, options=ExpertsOptions(dense=chosen, progress=False)
        )
        for chosen in ("host", "native")
    }
    ours, host = loaded["native"], loaded["host"]
    assert "lm_head" in ours.hf_quantizer.dense_layers.ours
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    with torch.inference_mode():
        for last in (1, 0):
            results = [each(PROMPT, logits_to_keep=last).logits.double() for each in (ours, host)]
            assert (results[0] - results[1]).norm() <= 1e-5 * results[1].norm()
    choice = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(PROMPT, **choice), host.generate(PROMPT, **choice))
    # PyTorch reads nothing of the head any more, but a token does.
    assert dense_bytes(ours) >= ours.lm_head.weight.nbytes
    read = [host_threads.read_bytes(each) for each in (ours, host)]
    assert read[1] - read[0] >= host.lm_head.weight.nbytes
