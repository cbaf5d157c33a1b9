"""Parameters that this server does not support, and their values without effect."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cpumoe.text.serving.errors import invalid

# Values that switch a parameter off.
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})


def refuse_unsupported(
    extra: Mapping[str, Any] | None,
    neutral: Mapping[str, Sequence[Any]],
    ignored: Collection[str],
    *,
    where: str = "",
) -> None:
    """Refuses fields with an effect that this server does not support.

    An unknown field may be a mistyped name, and is refused unless its value is one of `NOTHING`.

    Args:
        extra: the fields of the request that are not read.
        neutral: known fields that are not supported, and their values without effect. null never
            has an effect.
        ignored: fields whose values do not matter, because they do not change the answer.
        where: name of the object that has the fields.

    Raises:
        ApiError: a field is refused; the message names it.
    """
    for name, value in (extra or {}).items():
        if value is None or name in ignored:
            continue
        accepted = neutral.get(name, NOTHING)
        if any(_same(value, harmless) for harmless in accepted):
            continue
        full = f"{where}.{name}" if where else name
        if name not in neutral:
            raise invalid(f"unknown parameter: {full!r}", full, "unknown_parameter")
        values = [json.dumps(value) for value in accepted if value not in NOTHING]
        problem = f"this server supports only {' or '.join(values)}" if values else "not supported"
        raise invalid(f"{full}: {problem}; leave it out", full, "unsupported_parameter")


def _same(value: Any, other: Any) -> bool:
    # In Python, 1 equals True.
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _nothing(names: str) -> dict[str, Sequence[Any]]:
    return dict.fromkeys(names.split(), NOTHING)


# Fields that do not change the text, such as names for logs and hints for caches and schedulers.
_IGNORED = frozenset(
    _nothing(
        """
        bootstrap_host bootstrap_port bootstrap_room cache_prompt cache_salt conversation_id
        custom_labels extra_key log_metrics metadata no_logs prediction prompt_cache_key
        prompt_cache_retention request_id return_mm_kwargs rid routed_experts_prompt_start
        routed_experts_start_len routing_key safety_identifier service_tier session_id store
        truncation_side user
        """
    )
)
# Fields of several protocols that change the answer. OpenAI's come first, then those of vLLM and of
# SGLang.
_UNSUPPORTED: dict[str, Sequence[Any]] = {
    **_nothing("audio frequency_penalty functions logit_bias presence_penalty reasoning suffix"),
    "function_call": (*NOTHING, "none", "auto"),
    "modalities": ([], ["text"]),
    "verbosity": ("", "medium"),
    "web_search_options": (),
    **_nothing(
        """
        allowed_token_ids bad_words chat_template continue_final_message documents guided_choice
        guided_grammar guided_json guided_regex include_stop_str_in_output kv_transfer_params
        logits_processors logprob_token_ids media_io_kwargs mm_processor_kwargs priority
        prompt_embeds prompt_logprobs repetition_detection return_prompt_text return_token_ids
        return_token_offsets return_tokens_as_token_ids structured_outputs truncate_prompt_tokens
        use_beam_search vllm_xargs watermarking
        """
    ),
    "add_generation_prompt": (True,),
    "include_reasoning": (True,),
    # These concern beam search and slow tokenizers.
    "length_penalty": (1,),
    "spaces_between_special_tokens": (True, False),
    "stream_interval": (1,),
    "thinking_token_budget": (-1,),
    **_nothing(
        """
        audio_data custom_logit_processor custom_params data_parallel_rank ebnf image_data
        images_config input_embeds lora_path no_stop_trim regex return_cached_tokens_details
        return_hidden_states return_meta_info return_prompt_token_ids return_routed_experts
        routed_dp_rank session_params stop_regex structural_tag task token_ids_logprob
        use_audio_in_video video_data
        """
    ),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    # Fields of other servers' samplers.
    "tfs_z": (1,),
    "typical_p": (1,),
}


def refuse_common(
    extra: Mapping[str, Any] | None,
    neutral: Mapping[str, Sequence[Any]] | None = None,
    *,
    ignored: Collection[str] = (),
) -> None:
    """Refuses fields that no path of this server supports; see `refuse_unsupported`.

    Args:
        extra: the fields of the request that are not read.
        neutral: fields that add to, or replace, those of all paths.
        ignored: fields that add to those of all paths.
    """
    refuse_unsupported(extra, {**_UNSUPPORTED, **(neutral or {})}, _IGNORED.union(ignored))
