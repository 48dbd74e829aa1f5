from __future__ import annotations

import json
from pathlib import Path

import pytest

from map_bo.errors import CheckpointError
from map_bo.merging.align.pieces import piece_files, piece_ids


def sentencepiece(*pieces: str) -> bytes:
    content = b""
    for text in pieces:
        own = text.encode()
        piece = b"\x0a" + bytes([len(own)]) + own + b"\x15\x00\x00\x80\xbf" + b"\x18\x02"
        content += b"\x0a" + bytes([len(piece)]) + piece
    return content + b"\x12\x02\x18\x01"  # settings of its training


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(sentencepiece("<unk>", "\u2581the", "a"))
    (tmp_path / "tokenizer.model").write_text("YQ== 0\nYg== 1\n")
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\nYg== 1\n\n")
    vocab = [{"rank": 0, "token_bytes": "YQ==", "token_str": "a"}]
    (tmp_path / "tekken.json").write_text(json.dumps({"vocab": vocab}))
    found = {name: piece_ids(tmp_path / name) for name in piece_files(tmp_path)}
    assert found == {
        "spiece.model": {"<unk>": 0, "\u2581the": 1, "a": 2},
        "tokenizer.model": {"YQ==": 0, "Yg==": 1},
        "qwen.tiktoken": {"YQ==": 0, "Yg==": 1},
        "tekken.json": {"YQ==": 0},
    }


def test_against_sentencepiece_itself(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the cat sat on the mat and the dog ran\n" * 20)
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=30,
        minloglevel=2,
    )
    model = library.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    wanted = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    assert piece_ids(tmp_path / "spiece.model") == wanted


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x0a\xff",
        b"\x0a" + b"\xff" * 20,
        b"\x0b\x01",
        b"\x0a\x02\x15\x00",
        b"\xff\xfe no numbers",
        b"\x0a\x00",
        b"\x08\x01",
    ],
)
def test_other_content_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    if content:
        with pytest.raises(ValueError, match=r".+"):
            piece_ids(tmp_path / "tokenizer.model")
    else:
        assert piece_ids(tmp_path / "tokenizer.model") == {}


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(sentencepiece("a"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "spiece.model").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError):
        piece_ids(folder / "spiece.model")
