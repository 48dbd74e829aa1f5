"""Whether base and experts mean the same by their weights: configurations, tokens, preprocessing.

Tensors of the same names and shapes can still be weights of different functions: with another
``rope_theta``, activation or number of heads, or with tokens and labels at other places. Such a
merge would be wrong without a word.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from map_bo.errors import CheckpointError, MapBoError, MergeError, first_line, listed
from map_bo.foreign import read_json, read_text
from map_bo.merging.adapters.adapter import AdapterCheckpoint
from map_bo.merging.align.pieces import piece_files, piece_ids
from map_bo.merging.align.vocabulary import VocabularyRule, token_ids
from map_bo.merging.checkpoints.checkpoint import Checkpoint, read_object
from map_bo.merging.checkpoints.read_sharded import require_inside

__all__ = ["check_metadata", "setting_differences"]

logger = logging.getLogger(__name__)

# Settings that say nothing about what the weights compute: how they were trained, saved or are run.
_IGNORED = re.compile(
    r"_.*|architectures|transformers_version|(torch_)?dtype|use_cache|.*drop(out|path|_path|_rate)?\w*"
    r"|.*_pdrop|initializer_\w+|init_\w+|.*_init(ialization)?(_\w+)?|output_(attentions|hidden_states|"
    r"scores|router_logits)|return_dict\w*|gradient_checkpointing|problem_type|finetuning_task"
    r"|task_specific_params|attn_implementation|.*_(token|tokens)_ids?|label2id|num_labels"
    r"|vocab_size|quantization_config|(max|min)_length|do_sample|num_beams\w*|temperature|top_[kp]"
    r"|typical_p|(repetition|length|diversity)_penalty|no_repeat_ngram_size|early_stopping"
    r"|num_return_sequences|bad_words_ids|forced_\w+|suppress_tokens|begin_suppress_tokens"
    r"|pretraining_tp|router_aux_loss_coef|aux_loss_\w+|router_jitter_noise|classifier_\w*dropout"
    r"|mask_(time|feature)_\w+|apply_spec_augment|layerdrop|unsloth_\w+|auto_map|name_or_path"
    r"|is_training|ctc_\w+|tie_encoder_decoder|torchscript|prefix|tokenizer_class|chunk_size_\w+"
    r"|cross_attention_hidden_size|use_bfloat16|sep_token_id|language|model_max_length|id2label"
)
# Settings that may change it: the shapes of the weights say what matters of these.
_DOUBTFUL = re.compile(r"\w*max_\w*position\w*|n_positions|tie_word_embeddings")
_WINDOWS = ("sliding_window", "max_window_layers")
# Settings that change the function of the weights.
_REFUSED = re.compile(
    r"\w*rope_\w+|rope|.*rotary\w*|.*rotate\w*|yarn\w*|\w*act(ivation)?(_\w+)?|\w*_act"
    r"|.*activation\w*|.*nonlinearity|.*eps(ilon)?|(num|n)_\w*heads?\w*|\w*head_dim|\w*_heads"
    r"|(num|n)_(hidden_)?layers?|num_blocks|depths?|\w*layer_types|\w*sliding_window\w*"
    r"|attention_window|local_attention|attention_types|\w*max_window_layers|.*position\w*"
    r"|max_seq_len|.*scal(e|es|ing)\w*|\w*multiplier|query_pre_attn_scalar|\w*softcap\w*"
    r"|\w*softmax\w*|\w*temperature|image_size|patch_size|patch_stride|\w*num_channels|window_size"
    r"|tubelet_size|num_frames|hidden_size|intermediate_size|d_model|d_ff|n_embd|n_inner|ffn_dim"
    r"|\w*_bias|.*norm\w*|use_qk_norm|qk_\w+|is_decoder|is_causal|is_encoder_decoder|alibi"
    r"|parallel_attn|parallel_residual|use_parallel_residual|new_decoder_architecture"
    r"|num_experts\w*|num_local_experts|n_routed_experts|moe_\w+|norm_topk_prob|routed_\w+|topk_\w+"
    r"|\w*_group|conv_\w+|kernel_size|stride|dilation|hidden_act\w*|feature_layer|vision_feature_\w+"
    r"|projection_dim|pooling\w*|pool\w*|attention_type|attn_type|feed_forward_proj|is_gated_act"
    r"|dense_act_fn|relative_attention\w*|residual\w*|sampling_rate|num_mel_bins|global_attn\w*"
    r"|local_attn\w*|tie_word_embeddings|embedding_size|embed_dim|mlp_ratio|add_cross_attention"
)
# What it means when a configuration does not say it.
_NEUTRAL: tuple[object, ...] = (None, False, "absolute", "default", 0, 1, 1.0, 0.0, [], {})
_TELLING = re.compile(
    r"rope_\w+|partial_rotary_factor|sliding_window|position_embedding_type|\w*(scaling|multiplier)"
    r"|\w*softcapping"
)
_DEFAULTS: Mapping[str, object] = {"rope_theta": 10000.0}
_PREPROCESSING = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "1_Pooling/config.json", "sentence_bert_config.json",
)  # fmt: skip
# Settings of tokenizers that change which tokens a text becomes.
_TOKENIZING = (
    "do_lower_case", "lowercase", "strip_accents", "tokenize_chinese_chars", "add_prefix_space",
    "add_bos_token", "add_eos_token", "split_special_tokens", "legacy", "word_delimiter_token",
)  # fmt: skip
_STEPS = ("normalizer", "pre_tokenizer", "post_processor")
_PREPARED = re.compile(
    r"(image|rescale|crop|size|do|resample|patch|feature|sampling|n|hop|num|padding|pooling|word|return"
    r")\w*|mean|std|max_pixels|min_pixels|max_seq_length|video\w*|feature_extractor"
)
_DEFAULT_LABEL = re.compile(r"LABEL_\d+")
_HINT = (
    "merge models that were tuned from one base with one configuration; where the file is wrong "
    "and the weights are right, correct its config.json"
)


def check_metadata(
    experts: Mapping[str, Checkpoint],
    base: Checkpoint,
    *,
    vocabulary: VocabularyRule | None = None,
    heads: Collection[str] = (),
) -> None:
    """Refuse experts whose weights mean something else than the base's, by what is said of them.

    Compared are ``config.json`` (or the configuration of a model of transformers in memory), the
    ids of tokens, the order of labels, and the preprocessing. What changes the function of the
    weights is refused, by name; what may be harmless is logged as a warning; what only says how a
    model was trained, saved or is run is not compared.

    Args:
        experts: Name -> checkpoint as given.
        base: The base.
        vocabulary: How rows of embeddings are matched; by token they may have moved.
        heads: Tensors of the base that are not merged, since they are task heads.

    Raises:
        MergeError: When a setting, token or label differs.
    """
    whole = {n: e for n, e in experts.items() if not isinstance(e, AdapterCheckpoint)}
    for label, expert in whole.items():
        _check_settings(label, expert, base)
        _check_preprocessing(label, expert, base)
        _check_tokenizing(label, expert, base)
    _check_labels(whole, base, heads)
    if vocabulary is None:
        _check_tokens(whole, base)


def setting_differences(
    one: Mapping[str, Any], two: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Return what differs between two configurations, in words: what is refused, what is doubtful.

    A setting that only one of them has is compared with what its absence means, and is doubtful
    where that is not known.

    Args:
        one: Configuration of an expert.
        two: Configuration of the base.
    """
    mine, theirs = dict(_settings(one)), dict(_settings(two))
    unwindowed = all(part.get("use_sliding_window") is False for part in (mine, theirs))
    refused: list[str] = []
    doubtful: list[str] = []
    for key in sorted(mine.keys() | theirs.keys()):
        name = key.rpartition(".")[2]
        if _IGNORED.fullmatch(name):
            continue
        if name in _WINDOWS and unwindowed:
            continue
        known = bool(_REFUSED.fullmatch(name)) and not _DOUBTFUL.fullmatch(name)
        if key in mine and key in theirs:
            if not _same(mine[key], theirs[key]):
                text = f"{key} is {_shown(mine[key])} against {_shown(theirs[key])}"
                (refused if known else doubtful).append(text)
        elif known and _says_something(name, mine.get(key, theirs.get(key))):
            has = (
                f"{_shown(mine[key])} and not given"
                if key in mine
                else f"not given and {_shown(theirs[key])}"
            )
            doubtful.append(f"{key} is {has} in the base")
    return refused, doubtful


def _settings(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every setting; rotary ones as older configurations have them."""
    pending: list[tuple[str, Mapping[str, Any]]] = [(path, config)]
    while pending:
        path, part = pending.pop()
        for key, value in part.items():
            if key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
                for name, inner in value.items():
                    if name == "rope_theta":
                        yield f"{path}rope_theta", inner
                    elif isinstance(inner, Mapping):  # by kind of layer
                        pending.append((f"{path}rope_scaling.{name}.", inner))
                    elif name in ("rope_type", "type"):
                        yield f"{path}rope_scaling.rope_type", inner or "default"
                    else:
                        yield f"{path}rope_scaling.rope_{name.removeprefix('rope_')}", inner
            elif key in ("rope_parameters", "rope_scaling") and value is None:
                yield f"{path}rope_scaling.rope_type", "default"
            elif key in ("id2label", "label2id", "quantization_config", "task_specific_params"):
                continue
            elif isinstance(value, Mapping):
                pending.append((f"{path}{key}.", value))
            else:
                yield f"{path}{key}", value


def _same(one: object, two: object) -> bool:
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    return one == two or (one in (None, [], {}) and two in (None, [], {}))


def _says_something(name: str, value: object) -> bool:
    """Return whether a setting that the other one lacks is another than what its absence means."""
    if name in _DEFAULTS:
        return value != _DEFAULTS[name]
    return bool(_TELLING.fullmatch(name)) and value not in _NEUTRAL


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_settings(label: str, expert: Checkpoint, base: Checkpoint) -> None:
    one, two = expert.configuration, base.configuration
    if one is None or two is None:
        return
    refused, doubtful = setting_differences(one, two)
    if refused:
        raise MergeError(
            f"expert {label!r} has another configuration than the base, with which its weights "
            f"mean something else: {listed(refused)}",
            hint=_HINT,
        )
    if doubtful:
        logger.warning(
            "expert %r has another configuration than the base, whose settings the merged model "
            "gets: %s",
            label,
            listed(doubtful, 8),
        )


def _check_preprocessing(label: str, expert: Checkpoint, base: Checkpoint) -> None:
    if expert.directory is None or base.directory is None:
        return
    for name in _PREPROCESSING:
        one, two = read_object(expert.directory / name), read_object(base.directory / name)
        if one is None or two is None:
            continue
        mine, theirs = dict(_settings(one)), dict(_settings(two))
        different = [
            f"{key} is {_shown(mine[key])} against {_shown(theirs[key])}"
            for key in sorted(mine.keys() & theirs.keys())
            if _PREPARED.fullmatch(key.partition(".")[0]) and not _same(mine[key], theirs[key])
        ]
        if different:
            logger.warning(
                "expert %r was prepared otherwise than the base by %s: %s",
                label,
                name,
                listed(different, 8),
            )


def _check_tokenizing(label: str, expert: Checkpoint, base: Checkpoint) -> None:
    """Say where the expert's tokenizer or its chat template makes other tokens of a text."""
    if expert.directory is None or base.directory is None:
        return
    one, two = _tokenizer_facts(expert.directory), _tokenizer_facts(base.directory)
    different = [
        f"{key} is {_shown(one[key])} against {_shown(two[key])}"
        for key in sorted(one.keys() & two.keys())
        if not _same(one[key], two[key])
    ]
    if different:
        logger.warning(
            "expert %r reads texts otherwise than the base, whose tokenizer the merged model gets: "
            "%s",
            label,
            listed(different, 8),
        )
    mine, theirs = _chat_template(expert.directory), _chat_template(base.directory)
    if mine is not None and mine != theirs:
        logger.warning(
            "expert %r has %s; the merged model gets the base's files",
            label,
            "a chat template and the base has none"
            if theirs is None
            else "another chat template than the base",
        )


def _tokenizer_facts(folder: Path) -> dict[str, Any]:
    settings = _object(folder / "tokenizer_config.json")
    fast = _object(folder / "tokenizer.json")
    model = fast.get("model")
    merges = model.get("merges") if isinstance(model, Mapping) else None
    return (
        {key: settings[key] for key in _TOKENIZING if key in settings}
        | {f"{key} of tokenizer.json": fast[key] for key in _STEPS if key in fast}
        | ({} if merges is None else {"merges of tokenizer.json": _as_pairs(merges)})
    )


def _as_pairs(merges: object) -> object:
    """Return merges in the form of older files: both parts in one text."""
    if not isinstance(merges, list):
        return merges
    return [" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in merges]


def _chat_template(folder: Path) -> object:
    """Return the chat template of a folder, where later versions keep it first; None for none."""
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            require_inside(file)
            return read_text(file).strip()
    except (MapBoError, OSError, ValueError):
        return None
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _object(folder / name).get("chat_template")
        if found:
            return found.strip() if isinstance(found, str) else found
    return None


def _object(file: Path) -> Mapping[str, Any]:
    """Return what a file of JSON says; nothing where it cannot be read, which others tell."""
    try:
        if not file.is_file():
            return {}
        require_inside(file)
        content = read_json(file)
    except (MapBoError, OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _labels(checkpoint: Checkpoint) -> dict[int, str] | None:
    """Return the labels by index; None where there are none, or only the defaults."""
    config = checkpoint.configuration or {}
    given, back = config.get("id2label"), config.get("label2id")
    if not isinstance(given, Mapping) and isinstance(back, Mapping):
        given = {number: name for name, number in back.items()}
    if not isinstance(given, Mapping):
        return None
    found = {int(k): str(v) for k, v in given.items() if str(k).isdecimal()}
    if not found or all(_DEFAULT_LABEL.fullmatch(name) for name in found.values()):
        return None
    return found


def _check_labels(
    experts: Mapping[str, Checkpoint], base: Checkpoint, heads: Collection[str]
) -> None:
    """Refuse output layers that are merged and whose rows stand for different labels."""
    known = [("the base", _labels(base))]
    known += [(f"expert {label!r}", _labels(expert)) for label, expert in experts.items()]
    with_labels = [(label, found) for label, found in known if found]
    for label, found in with_labels[1:]:
        first, expected = with_labels[0]
        if found == expected or not _has_rows(base, len(expected), heads):
            continue
        moved = [i for i in sorted(found) if found[i] != expected.get(i)]
        texts = [f"{i} is {found[i]!r} against {expected.get(i)!r}" for i in moved]
        raise MergeError(
            f"{label} has other labels than {first} (id2label of config.json): {listed(texts)}",
            hint="the rows of their output layers stand for different labels: train the experts "
            "with one order of labels, or save them over a base without that layer, so that each "
            "keeps its own",
        )


def _has_rows(base: Checkpoint, count: int, heads: Collection[str]) -> bool:
    """Return whether the base has an output layer of so many rows that is merged.

    Embeddings are none, such as those of BERT's two token types.
    """
    return any(
        len(base.shape(name)) == 2 and base.shape(name)[0] == count and name not in heads
        for name in base.names
        if "embed" not in name
    )


def _check_tokens(experts: Mapping[str, Checkpoint], base: Checkpoint) -> None:
    """Refuse tokens at other ids, and two experts with different tokens at one id.

    A token of the base that an expert replaced by another one at the same id is logged.
    """
    for label, expert in experts.items():
        _check_pieces(label, expert, base)
    pre = _tokens(base, "the base") if experts else None
    known = {} if pre is None else pre
    at = {number: token for token, number in known.items()}
    rows = max((base.shape(n)[0] for n in base.names if len(base.shape(n)) == 2), default=0)
    tokens: dict[int, tuple[str, str]] = {}  # id -> token and its expert, of those not the base's
    ids: dict[str, tuple[int, str]] = {}
    for label, expert in experts.items():
        own = _tokens(expert, f"expert {label!r}")
        if own is None:
            continue
        _require_places(label, own, known)
        new = {t: i for t, i in own.items() if t not in known and i < rows}
        replaced = [f"{t!r} for {at[i]!r} (id {i})" for t, i in new.items() if i in at]
        if replaced:
            logger.warning(
                "expert %r has other tokens than the base at the same ids, and their rows are "
                "merged: %s",
                label,
                listed(replaced),
            )
        for token, number in new.items():
            there, other = ids.setdefault(token, (number, label))
            if there != number:
                raise _moved(label, [f"{token!r} is {number} against {there}"], other)
            before, other = tokens.setdefault(number, (token, label))
            if before != token:
                raise _moved(label, [f"id {number} is {token!r} against {before!r}"], other)


def _check_pieces(label: str, expert: Checkpoint, base: Checkpoint) -> None:
    """Refuse pieces of sentencepiece and its like at other places than in the base's file."""
    mine, theirs = expert.directory, base.directory
    if mine is None or theirs is None:
        return
    for name in sorted(set(piece_files(mine)) & set(piece_files(theirs))):
        try:
            one, two = piece_ids(mine / name), piece_ids(theirs / name)
        except (CheckpointError, OSError, ValueError) as error:
            logger.warning(
                "%s of expert %r and the base were not compared: %s", name, label, first_line(error)
            )
            continue
        moved = [piece for piece, place in two.items() if one.get(piece, place) != place]
        if moved:
            texts = [f"{piece!r} is {one[piece]} against {two[piece]}" for piece in moved]
            raise MergeError(
                f"the tokens of expert {label!r} have other ids than those of the base by {name}: "
                f"{listed(texts, 3)}",
                hint="rows of embeddings stand for different tokens; save both tokenizers with a "
                "tokenizer.json, and vocabulary='tokens' matches the rows by token",
            )


def _tokens(checkpoint: Checkpoint, label: str) -> dict[str, int] | None:
    try:
        return token_ids(checkpoint.directory)
    except CheckpointError as error:
        logger.warning("the tokens of %s were not compared: %s", label, error.message)
        return None


def _require_places(label: str, own: Mapping[str, int], pre: Mapping[str, int]) -> None:
    moved = [token for token, number in pre.items() if own.get(token, number) != number]
    if moved:
        texts = [f"{token!r} is {own[token]} against {pre[token]}" for token in moved]
        raise _moved(label, texts, None)


def _moved(label: str, texts: list[str], other: str | None) -> MergeError:
    against = "the base" if other is None else f"expert {other!r}"
    return MergeError(
        f"the tokens of expert {label!r} have other ids than those of {against}: "
        f"{listed(texts, 3)}",
        hint="vocabulary='tokens' matches the rows of embeddings by token; on the command line "
        "problem.vocabulary=tokens",
    )
