"""What docs/operators-statistics.md shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from map_bo.operators.statistics.fisher import Fisher
from map_bo.operators.statistics.regmean import RegMean, RegMeanPlusPlus
from map_bo.operators.statistics.statistics import load_statistics
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator

TEXT = (Path(__file__).parents[2] / "docs" / "operators-statistics.md").read_text()


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained("base")
        for name in ("math", "code"):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.1 * torch.randn_like(p))
            model.save_pretrained(name)

    def batches(seed: int) -> list[dict[str, torch.Tensor]]:
        ids = torch.randint(1, 20, (4, 6), generator=make_generator(seed))
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]

    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (further,) = re.findall(r"<!-- merged inputs -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(f"{code}\n{further}", {"math_batches": batches(1), "code_batches": batches(2)})
    for kind, suffix, operator in (
        ("fisher", "fisher", Fisher),
        ("grams", "grams", RegMean),
        ("merged_grams", "merged", RegMeanPlusPlus),
    ):
        files = {name: f"{name}-{suffix}.safetensors" for name in ("math", "code")}
        known = load_statistics(files["math"], kind=kind, model="math")
        assert known.data == ("" if kind == "merged_grams" else "math train")
        problem = MergedModelProblem(
            transformers.LlamaForCausalLM(config),
            base="base",
            experts={"math": "math", "code": "code"},
            evaluators={"zero": lambda model: 0.0},
            operator=operator(files),
        )
        expert = problem.merged(torch.tensor([0.0, 1.0]))
        tuned = transformers.LlamaForCausalLM.from_pretrained("code", dtype=torch.float32)
        for key, value in tuned.state_dict().items():
            assert torch.allclose(expert[key].float(), value, rtol=1e-2, atol=1e-3)
        average = problem.merged(torch.tensor([0.5, 0.5]))
        assert not torch.equal(average["lm_head.weight"], expert["lm_head.weight"])


def test_the_settings_that_are_named_exist() -> None:
    for name in re.findall(r"operator=(\w+)", TEXT):
        if name.islower():
            assert (Path(__file__).parents[2] / "conf" / "operator" / f"{name}.yaml").exists()
