from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from map_bo.errors import MergeError
from map_bo.merging.align.metadata import check_metadata, setting_differences
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 4,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "vision_config": {"patch_size": 14, "image_size": 224},
}


def folder(path: Path, config: object = None, tokens: list[str] | None = None) -> Checkpoint:
    path.mkdir()
    save_file(
        {"emb.weight": torch.ones(4, 3), "head.weight": torch.ones(3, 3)},
        path / "model.safetensors",
    )
    (path / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    if tokens is not None:
        vocab = {token: i for i, token in enumerate(tokens)}
        content = {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": []}
        (path / "tokenizer.json").write_text(json.dumps(content))
    return open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"num_attention_heads": 2}, "num_attention_heads"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_theta"),
        (
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
            "rope_type|factor",
        ),
        ({"rope_theta": 5e5, "rope_parameters": None}, "rope_theta"),  # as version 4 has it
        ({"vision_config": {"patch_size": 16, "image_size": 224}}, "vision_config.patch_size"),
    ],
)
def test_what_changes_the_function_is_refused_by_name(
    change: dict[str, Any], named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, expert = folder(tmp_path / "base"), folder(tmp_path / "e", LLAMA | change)
    with caplog.at_level(logging.WARNING, "map_bo"):
        try:
            check_metadata({"e": expert}, base)
            said = caplog.text
        except MergeError as error:
            said = error.message
    assert any(name in said for name in named.split("|"))


@pytest.mark.parametrize(
    ("key", "one", "two"),
    [
        ("position_embedding_type", "relative_key", "absolute"),
        ("sliding_window", 128, 4096),
        ("attention_multiplier", 0.5, 1.0),
        ("logits_scaling", 8, 1),
        ("attn_logit_softcapping", 50.0, None),
        ("partial_rotary_factor", 0.5, 1.0),
        ("scale_attn_weights", True, False),
        ("layer_norm_epsilon", 1e-12, 1e-5),
        ("activation_function", "relu", "gelu_new"),
        ("num_experts_per_tok", 1, 2),
        ("is_decoder", True, False),
    ],
)
def test_settings_that_are_refused(key: str, one: object, two: object) -> None:
    refused, doubtful = setting_differences({key: one}, {key: two})
    assert len(refused) == 1
    assert refused[0].startswith(f"{key} is ")
    assert not doubtful


@pytest.mark.parametrize(
    "key",
    [
        "attention_dropout",
        "hidden_dropout_prob",
        "drop_path_rate",
        "use_cache",
        "torch_dtype",
        "dtype",
        "pad_token_id",
        "transformers_version",
        "_name_or_path",
        "architectures",
        "initializer_range",
    ],
)
def test_settings_that_say_nothing_of_the_weights(key: str) -> None:
    assert setting_differences({key: 1}, {key: 2}) == ([], [])


def test_settings_that_are_doubtful_are_named_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert setting_differences({"rope_theta": 1e6}, {})[1] == [
        "rope_theta is 1000000.0 and not given in the base"
    ]
    assert setting_differences({"rope_theta": 10000}, {}) == ([], [])
    unwindowed = {"use_sliding_window": False}
    assert setting_differences(
        {"sliding_window": 8, **unwindowed}, {"sliding_window": 9, **unwindowed}
    ) == ([], [])
    base = folder(tmp_path / "base")
    with caplog.at_level(logging.WARNING, "map_bo"):
        check_metadata({"e": folder(tmp_path / "e", LLAMA | {"max_position_embeddings": 9})}, base)
        check_metadata(
            {"e": folder(tmp_path / "f", LLAMA | {"some_new_setting": 9})},
            folder(tmp_path / "g", LLAMA | {"some_new_setting": 8}),
        )
    assert "some_new_setting is 9 against 8" in caplog.text


def test_labels_in_another_order_are_refused_where_their_layer_is_merged(tmp_path: Path) -> None:
    def labelled(name: str, *labels: str) -> Checkpoint:
        return folder(tmp_path / name, {"id2label": dict(enumerate(labels))})

    plain = folder(tmp_path / "base", {"id2label": {i: f"LABEL_{i}" for i in range(3)}})
    a, b = labelled("a", "bad", "so-so", "good"), labelled("b", "good", "so-so", "bad")
    check_metadata({"a": a}, plain)
    with pytest.raises(MergeError, match=r"expert 'b' has other labels than expert 'a' \(id2label"):
        check_metadata({"a": a, "b": b}, plain)
    check_metadata({"a": a, "b": b}, plain, heads={"emb.weight", "head.weight"})


def test_embeddings_are_no_output_layer_of_labels(tmp_path: Path) -> None:
    """BERT has two token types, and many tasks have two labels."""

    def labelled(name: str, *labels: str) -> Checkpoint:
        (tmp_path / name).mkdir()
        config = {"id2label": dict(enumerate(labels))}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        tensors = {"embeddings.token_type_embeddings.weight": torch.zeros(2, 4)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        return open_checkpoint(tmp_path / name)

    base = labelled("base")
    check_metadata({"a": labelled("a", "no", "yes"), "b": labelled("b", "x", "y", "z")}, base)


def test_moved_tokens_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = folder(tmp_path / "base", tokens=["x", "y", "<r0>", "<r1>"])
    moved = folder(tmp_path / "moved", tokens=["x", "y", "<r1>", "<r0>"])
    with pytest.raises(MergeError, match="'<r0>' is 3 against 2") as caught:
        check_metadata({"e": moved}, base)
    assert "vocabulary='tokens'" in str(caught.value.hint)
    check_metadata({"e": moved}, base, vocabulary="tokens")
    one = folder(tmp_path / "one", tokens=["x", "y", "<think>", "<r1>"])
    two = folder(tmp_path / "two", tokens=["x", "y", "<tool>", "<r1>"])
    with caplog.at_level(logging.WARNING, "map_bo"):
        check_metadata({"one": one}, base)
    assert "'<think>' for '<r0>' (id 2)" in caplog.text
    with pytest.raises(MergeError, match="id 2 is '<tool>' against '<think>'"):
        check_metadata({"one": one, "two": two}, base)
    other = folder(tmp_path / "other", tokens=["x", "y", "<r0>", "<think>"])
    with pytest.raises(MergeError, match="'<think>' is 3 against 2"):
        check_metadata({"one": one, "other": other}, base)
    with pytest.raises(MergeError, match="id 2 is '<r0>' against '<think>'"):
        check_metadata({"one": one, "other": other}, folder(tmp_path / "bare"))


def test_preprocessing_and_damaged_files_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, expert = folder(tmp_path / "base"), folder(tmp_path / "e")
    (tmp_path / "base/preprocessor_config.json").write_text('{"image_mean": [0.5], "x": 1}')
    (tmp_path / "e/preprocessor_config.json").write_text('{"image_mean": [0.1], "x": 2}')
    (tmp_path / "e/tokenizer.json").write_text("{")
    with caplog.at_level(logging.WARNING, "map_bo"):
        check_metadata({"e": expert}, base)
    assert "image_mean is [0.1] against [0.5]" in caplog.text
    assert "were not compared" in caplog.text


def test_how_texts_become_tokens_is_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, expert = folder(tmp_path / "base"), folder(tmp_path / "e")
    for path, lower, template, rest in (
        (tmp_path / "base", True, "A {{ x }}", {"normalizer": {"type": "NFC"}}),
        (tmp_path / "e", False, "B {{ x }}", {"normalizer": None}),
    ):
        said = {"do_lower_case": lower, "chat_template": template, "padding_side": str(lower)}
        (path / "tokenizer_config.json").write_text(json.dumps(said))
        vocab = {"model": {"vocab": {"a": 0}, "merges": [["a", "b"]] if lower else ["a b"]}}
        (path / "tokenizer.json").write_text(json.dumps(vocab | rest))
    (tmp_path / "e" / "processor_config.json").write_text('{"image_processor": {"image_mean": 1}}')
    (tmp_path / "base" / "processor_config.json").write_text(
        '{"image_processor": {"image_mean": 2}}'
    )
    with caplog.at_level(logging.WARNING, "map_bo"):
        check_metadata({"e": expert}, base)
    assert "do_lower_case is false against true" in caplog.text
    assert "normalizer of tokenizer.json is null" in caplog.text
    assert "another chat template than the base" in caplog.text
    assert "image_processor.image_mean is 1 against 2" in caplog.text
    assert "padding_side" not in caplog.text
    assert "merges" not in caplog.text  # the same in two forms
    caplog.clear()
    check_metadata({"e": base}, base)
    assert not caplog.text


def test_moved_pieces_are_refused_without_a_tokenizer_json(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, expert = folder(tmp_path / "base"), folder(tmp_path / "e")
    (tmp_path / "base" / "own.tiktoken").write_text("YQ== 0\nYg== 1\n")
    (tmp_path / "e" / "own.tiktoken").write_text("Yg== 0\nYQ== 1\n")
    with pytest.raises(MergeError, match=r"by own\.tiktoken: 'YQ==' is 1 against 0"):
        check_metadata({"e": expert}, base)
    (tmp_path / "e" / "own.tiktoken").write_text("\0")
    with caplog.at_level(logging.WARNING, "map_bo"):
        check_metadata({"e": expert}, base)
    assert "own.tiktoken of expert 'e' and the base were not compared" in caplog.text


def test_labels_are_known_by_their_ids_too(tmp_path: Path) -> None:
    configs = [
        LLAMA | {"label2id": {n: i for i, n in enumerate(names)}} for names in ("abc", "cba")
    ]
    base, expert = (folder(tmp_path / str(i), config) for i, config in enumerate(configs))
    with pytest.raises(MergeError, match="other labels"):
        check_metadata({"e": expert}, base)
