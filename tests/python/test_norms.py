"""RMS norms of transformers' models, which become one operation each where a trial proves it."""

import copy

import pytest
import tiny_models
import torch
from torch import nn

pytest.importorskip("transformers")

import families
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4RMSNorm,
    DeepseekV4UnweightedRMSNorm,
)
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from cpumoe.integrations.transformers import ExpertsOptions, from_pretrained
from cpumoe.integrations.transformers.norms import swap_norms

WIDTH = 96
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


class Norm(nn.Module):
    """What most families have, in other words. Tests change a part of it."""

    def __init__(self, width=WIDTH, small=1e-5):
        super().__init__()
        self.gain = nn.Parameter(random(width))
        self.small = small

    def forward(self, states):
        return self.scaled(self.normed(states.float()), states)

    def normed(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.small)

    def scaled(self, normed, states):
        return self.gain * normed.to(states.dtype)


class OnePlusRounded(Norm):
    def scaled(self, normed, states):
        return (normed * (1.0 + self.gain).float()).to(states.dtype)


def exact(norm, x, scale):
    """The norm in fp64, with the eps of any of the classes below."""
    eps = next(value for value in vars(norm).values() if type(value) is float)
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale.double()


def weight(norm):
    return norm.weight


def one_plus(norm):
    return 1 + norm.weight.float()


NORMS = {
    "narrow product": (lambda: Qwen3MoeRMSNorm(WIDTH, 1e-5), weight),
    "wide product": (lambda: GptOssRMSNorm(WIDTH, 1e-5), weight),
    "one plus": (lambda: Qwen3NextRMSNorm(WIDTH, 1e-5), one_plus),
    "one plus, rounded": (OnePlusRounded, lambda norm: (1 + norm.gain).float()),
    "power": (lambda: Gemma4RMSNorm(WIDTH, 1e-5), weight),
    "no weight": (lambda: DeepseekV4UnweightedRMSNorm(1e-5), lambda norm: torch.ones(1)),
    "other names": (Norm, lambda norm: norm.gain),
}


def make(name, dtype):
    norm = NORMS[name][0]().eval()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(random(WIDTH))
    return norm.to(dtype)


def swapped(norm):
    model = nn.ModuleDict({"norm": copy.deepcopy(norm)})
    return model["norm"], swap_norms(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_results_are_as_exact_as_the_hosts(name, dtype):
    norm = make(name, dtype)
    ours, done = swapped(norm)
    assert done.ours == ["norm"]
    assert not done.hosts
    for size in (1e-4, 1, 100):
        for shape in ((WIDTH,), (0, WIDTH), (2, 3, WIDTH), (1, 2, 300, WIDTH)):
            x = (random(*shape) * size).to(dtype)
            expected = exact(norm, x, NORMS[name][1](norm))
            actual, hosts = ours(x), norm(x)
            assert actual.dtype == hosts.dtype == dtype
            assert actual.shape == hosts.shape
            error, hosts_error = ((y.double() - expected).norm() for y in (actual, hosts))
            assert error <= 1.01 * hosts_error + 1e-6 * expected.norm()
            assert error <= torch.finfo(dtype).eps * expected.norm()
    strided = random(WIDTH, 4).to(dtype).T
    assert torch.equal(ours(strided), ours(strided.contiguous()))


def test_weights_of_another_dtype():
    norm = DeepseekV4RMSNorm(WIDTH, 1e-5).eval()  # whose weights stay fp32
    ours, done = swapped(norm)
    assert done.ours
    x = random(3, WIDTH)
    with torch.no_grad():
        assert torch.equal(ours(x.bfloat16()), norm(x.bfloat16()))
        # This formula returns fp32 then, as the host's code says.
        wide = Norm().eval()
        other, done = swapped(wide)
        assert done.ours
        assert torch.equal(other(x.bfloat16()), wide(x.bfloat16()))
        assert other(x.bfloat16()).dtype == torch.float32


def changed(**methods):
    return type("Changed", (Norm,), methods)()


def with_buffer():
    norm = Norm()
    norm.register_buffer("shift", torch.ones(WIDTH))
    return norm


def of(normed):
    return changed(normed=lambda self, x: normed(self, x))


def scaled(result):
    return changed(scaled=lambda self, y, x: result(self.gain, y, x))


MUTATIONS = {
    "another epsilon": lambda: of(lambda s, x: x * (x.square().mean(-1, True) + 2e-5).rsqrt()),
    "no epsilon": lambda: of(lambda s, x: x * x.square().mean(-1, True).rsqrt()),
    "epsilon outside": lambda: of(lambda s, x: x / (x.square().mean(-1, True).sqrt() + s.small)),
    "epsilon as the least": lambda: of(
        lambda s, x: x * x.square().mean(-1, True).clamp(min=s.small).rsqrt()
    ),
    "minus the mean": lambda: of(lambda s, x: Norm.normed(s, x - x.mean(-1, keepdim=True))),
    "a sum": lambda: of(lambda s, x: x * (x.square().sum(-1, True) + s.small).rsqrt()),
    "unbiased": lambda: of(
        lambda s, x: x * (x.square().sum(-1, True) / (x.shape[-1] - 1) + s.small).rsqrt()
    ),
    "the largest": lambda: of(lambda s, x: x / (x.abs().amax(-1, True) + s.small)),
    "absolute values": lambda: of(lambda s, x: x / (x.abs().mean(-1, True) + s.small)),
    "of all rows": lambda: of(lambda s, x: x * (x.square().mean() + s.small).rsqrt()),
    "of groups": lambda: of(lambda s, x: Norm.normed(s, x.unflatten(-1, (-1, 32))).flatten(-2, -1)),
    "of the first half": lambda: of(
        lambda s, x: x * (x[..., : WIDTH // 2].square().mean(-1, True) + s.small).rsqrt()
    ),
    "another dimension": lambda: of(lambda s, x: x * (x.square().mean(0) + s.small).rsqrt()),
    "limited input": lambda: of(lambda s, x: Norm.normed(s, x.clamp(-50, 50))),
    "limited output": lambda: of(lambda s, x: Norm.normed(s, x).clamp(-2, 2)),
    "a factor": lambda: scaled(lambda gain, y, x: gain * y * 1.00001),
    "a bias": lambda: scaled(lambda gain, y, x: gain * y + 1e-5),
    "a bias by weight": lambda: scaled(lambda gain, y, x: gain * y + gain * 1e-5),
    "two plus": lambda: scaled(lambda gain, y, x: (2 + gain) * y),
    "absolute weight": lambda: scaled(lambda gain, y, x: gain.abs() * y),
    "exponential weight": lambda: scaled(lambda gain, y, x: gain.exp() * y),
    "squared weight": lambda: scaled(lambda gain, y, x: gain.square() * y),
    "flipped weight": lambda: scaled(lambda gain, y, x: gain.flip(0) * y),
    "weight first": lambda: changed(
        forward=lambda self, x: self.normed(x.float() * self.gain).to(x.dtype)
    ),
    "a gate": lambda: scaled(lambda gain, y, x: gain * y * x.sigmoid()),
    "a residual": lambda: scaled(lambda gain, y, x: gain * y + x),
    "rounded": lambda: scaled(lambda gain, y, x: (gain * y).bfloat16().float()),
    "two results": lambda: scaled(lambda gain, y, x: (gain * y, y)),
    "another shape": lambda: scaled(lambda gain, y, x: (gain * y)[None]),
    "another dtype": lambda: scaled(lambda gain, y, x: (gain * y).double()),
    "NaN": lambda: scaled(lambda gain, y, x: gain * y * float("nan")),
    "an error": lambda: scaled(lambda gain, y, x: 1 / 0),
    "another argument": lambda: changed(forward=lambda self, x, gate: Norm.forward(self, x) * gate),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_another_formula_stays_the_hosts(name):
    norm = MUTATIONS[name]().eval()
    own = type(norm)
    ours, done = swapped(norm)
    assert done.hosts == {"norm": "it computes something else"}
    assert type(ours) is own


def test_what_cannot_be_tried_stays_the_hosts():
    model = nn.ModuleDict(
        {
            "replaced": Norm(),
            "meta": Norm().to("meta"),
            "in fp64": Norm().double(),
            "with a buffer": with_buffer(),
            "torchs": nn.RMSNorm(WIDTH),
            "dropout": nn.Dropout(0.0),
        }
    )
    model["replaced"].forward = lambda x: x
    done = swap_norms(model)
    assert not done.ours
    assert done.hosts == {
        "replaced": "something has replaced its forward",
        "meta": "its weight is torch.float32 on meta",
        "in fp64": "its weight is torch.float64 on cpu",
    }


def test_modules_of_one_class_may_differ():
    model = nn.ModuleList([Norm(), Norm(small=1e-2), Norm(32), Norm().bfloat16(), Norm()]).eval()
    host = copy.deepcopy(model)
    assert swap_norms(model).ours == ["0", "1", "2", "3", "4"]
    for ours, other in zip(model, host, strict=True):
        x = (random(3, len(other.gain)) * 0.01).to(other.gain.dtype)
        assert ours.small == other.small
        torch.testing.assert_close(ours(x), other(x))
    assert not swap_norms(model).ours  # nothing is left to replace


def test_the_module_stays_what_it_was():
    norm = Norm().eval()
    parameter, seen = norm.gain, []
    model = nn.ModuleDict({"norm": norm})
    norm.register_forward_hook(lambda module, args, result: seen.append(result))
    expected = norm(random(2, WIDTH))
    del seen[:]
    assert swap_norms(model).ours
    assert not seen  # a trial calls no hooks
    assert model["norm"] is norm
    assert isinstance(norm, Norm)
    assert (type(norm).__name__, type(norm).__module__) == ("Norm", __name__)
    assert norm.gain is parameter
    assert [*model.state_dict()] == ["norm.gain"]
    result = norm(random(2, WIDTH))
    torch.testing.assert_close(result, expected)
    assert seen == [result]
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        norm.gain.mul_(2)  # a change counts at once
    torch.testing.assert_close(norm(random(2, WIDTH)), 2 * expected)
    torch.testing.assert_close(twin(random(2, WIDTH)), expected)


def test_other_calls_are_the_hosts():
    class Gated(Norm):
        def forward(self, states, gate=None):
            result = super().forward(states)
            if self.training:
                result = result + 1
            return result if gate is None else result * gate

    host = Gated().eval()
    ours, done = swapped(host)
    assert done.ours
    x = random(3, WIDTH)
    assert torch.equal(ours(x, x), host(x, x))
    assert torch.equal(ours(x, gate=x), host(x, gate=x))
    assert torch.equal(ours(states=x), host(states=x))
    assert torch.equal(ours(x.double()), host(x.double()))
    assert torch.equal(ours(x[:, :1]), host(x[:, :1]))
    assert torch.equal(ours.train()(x), host.train()(x))
    ours, host = ours.eval().to(torch.bfloat16), host.eval().to(torch.bfloat16)
    assert torch.equal(ours(x), host(x))
    assert ours.to("meta")(x.to("meta")).is_meta


def test_gradients_and_compiled_code():
    host = Norm().eval()
    ours, _ = swapped(host)
    for norm in (ours, host):
        norm.x = random(3, WIDTH).requires_grad_()
        (norm(norm.x) * random(3, WIDTH).cos()).sum().backward()
    torch.testing.assert_close(ours.x.grad, host.x.grad)
    torch.testing.assert_close(ours.gain.grad, host.gain.grad)
    with torch.no_grad():
        x = random(3, WIDTH)
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), host(x))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gemma4", "muse_spark"])
def test_logits_of_a_family(family):
    model = families.tiny_model(family)
    prompt = torch.arange(3, 27)[None]
    with torch.no_grad():
        expected = families.logits(model, prompt)
        assert swap_norms(model).ours
        difference = families.logits(model, prompt) - expected
    assert difference.norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_loading_makes_norms_ours_where_dense_layers_are(family, tmp_path):
    folder = tiny_models.FAMILIES[family].write(tmp_path)
    counts = {}
    for dense in ("host", "native"):
        model = from_pretrained(folder, options=ExpertsOptions(dense=dense, progress=False))
        done = model.hf_quantizer.norm_modules
        names = [name for name, m in model.named_modules() if "RMSNorm" in type(m).__name__]
        counts[dense] = (len(done.ours), len(done.hosts), len(names))
    assert counts["host"][:2] == (0, 0)
    assert counts["native"] == (len(names), 0, len(names))
