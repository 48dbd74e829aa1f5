from __future__ import annotations

from pathlib import Path

from benchmarks.quality.kept import KEPT, restore, save


def test_what_is_missing_is_copied_and_nothing_overwritten(tmp_path: Path) -> None:
    source, target = tmp_path / "kept", tmp_path / "cache"
    (source / "digits" / "mlp").mkdir(parents=True)
    (source / "digits" / "mlp" / "base.safetensors").write_bytes(b"one")
    (source / "digits" / "mlp" / "flip.safetensors").write_bytes(b"two")
    (source / "digits" / "mlp" / ".lock").touch()
    (target / "digits" / "mlp").mkdir(parents=True)
    (target / "digits" / "mlp" / "base.safetensors").write_bytes(b"own")
    assert restore(source, target) == 1
    assert (target / "digits" / "mlp" / "base.safetensors").read_bytes() == b"own"
    assert (target / "digits" / "mlp" / "flip.safetensors").read_bytes() == b"two"
    assert {path.name for path in (target / "digits" / "mlp").iterdir()} == {
        "base.safetensors",
        "flip.safetensors",
    }
    assert restore(source, target) == 0


def test_saving_is_the_way_back(tmp_path: Path) -> None:
    (tmp_path / "cache" / "plateau").mkdir(parents=True)
    (tmp_path / "cache" / "plateau" / "first.safetensors").write_bytes(b"one")
    assert save(tmp_path / "cache", tmp_path / "kept") == 1
    assert (tmp_path / "kept" / "plateau" / "first.safetensors").read_bytes() == b"one"


def test_the_models_of_every_real_case_are_kept() -> None:
    from benchmarks.quality.cases_plateau import EXPERTS
    from map_bo.problems.zoo.digits import DigitsZoo

    kept = {path.relative_to(KEPT) for path in KEPT.rglob("*.safetensors")}
    names = {path.stem for path in kept}
    assert set(DigitsZoo(16).names) <= names
    assert set(EXPERTS) <= names
    assert {path.parts[0] for path in kept} == {
        "digits",
        "images",
        "plateau",
        "text-small",
    }
