"""Every name of LLaMA-Factory that is swapped, and why."""

from __future__ import annotations


def _swaps():
    """(module, name, replacement maker): every place where 0.9.5 has no extension point, and why."""
    from . import data, model, training

    return [
        # the entry's own `llava_orpo` block and registry name are not kept by DatasetAttr
        ("llamafactory.data.loader", "get_dataset_list", data.keep_entries),
        # filter and held-out split come before max_samples; images must not be decoded or written again
        ("llamafactory.data.loader", "_load_single_dataset", data.sample_after_filter),
        ("llamafactory.data.loader", "align_dataset", data.align),
        # the prompt once per pair; skipped pairs counted and listed
        ("llamafactory.data.loader", "PairwiseDatasetProcessor", data.pair_processor),
        ("llamafactory.data.loader", "_get_preprocessed_dataset", data.drop_skipped),
        # the step
        ("llamafactory.train.dpo.workflow", "get_dataset", training.check_before_data),
        ("llamafactory.train.dpo.workflow", "PairwiseDataCollatorWithPadding", training.collator),
        ("llamafactory.train.dpo.trainer", "CustomDPOTrainer", training.trainer),
        ("llamafactory.train.tuner", "LogCallback", training.log_callback),
        # vision tower and projector stay in 16 bit; tiles; nothing silently random; published names on export
        ("llamafactory.model.patcher", "configure_quantization", model.spare_vision),
        ("llamafactory.model.loader", "load_config", model.limit_config),
        ("llamafactory.model.loader", "patch_processor", model.limit_processor),
        ("llamafactory.train.tuner", "load_model", model.published_export),
        ("llamafactory.train.tuner", "load_tokenizer", model.untouched_tokenizer_files),
        # answers of chat, webchat and api as the model wrote them
        ("llamafactory.chat.hf_engine", "load_tokenizer", model.unedited_answers),
    ]
