"""lm-evaluation-harness: its likelihood of a text is that of ``cpumoe eval``."""

import json
import math
import os
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

CONTEXT = 1024
FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def options(url, model):
    return {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": os.environ["CPUMOE_TOKENIZER"],
        "max_length": CONTEXT,
        "max_retries": 1,
    }


def test_likelihood_is_that_of_cpumoe_eval(options, tmp_path):
    text = Path(os.environ["CPUMOE_TEXT"]).read_text("utf-8")
    data = tmp_path / "text.json"
    data.write_text(json.dumps([{"text": text}]), "utf-8")
    task = (FOLDER / "task.yaml").read_text("utf-8").replace("HELD_OUT_JSON", str(data))
    (tmp_path / "task.yaml").write_text(task, "utf-8")
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=options,
        tasks=["held_out_text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    bits = results["results"]["held_out_text"]["bits_per_byte,none"] * len(text.encode())
    (eval_result,) = json.loads(Path(os.environ["CPUMOE_EVAL"]).read_text("utf-8"))["results"]
    nats = eval_result["nats_per_token"] * eval_result["scored_tokens"]
    assert bits * math.log(2) == pytest.approx(nats, rel=2e-3)


def test_likelihoods_of_continuations(options):
    # Several prompts per request.
    api = LocalCompletionsAPI(**options, batch_size=4)
    pairs = [("In the beginning God created the", end) for end in (" heaven", " heaven and", " xq")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    heaven, longer, nonsense = api.loglikelihood(requests)
    assert 0 > heaven[0] > longer[0]
    assert heaven[0] > nonsense[0]
    assert nonsense[1] is False


def test_generation(options):
    api = LocalCompletionsAPI(**options)
    arguments = ("Once upon", {"until": ["\n\n", "."], "max_gen_toks": 10, "temperature": 0})
    (text,) = api.generate_until([Instance("generate_until", {}, arguments, 0)])
    assert text
    assert "." not in text
