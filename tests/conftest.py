"""Marks the tests that are slow: measured on 2026-11-30, they take nine tenths of the suite's time.

What is left, `pytest -m "not slow"`, is to stay below four minutes on two cores: `--durations=30` tells what to add.
"""

import os

# Before torch is imported, here and in all processes that tests start: their tensors are small, and threads that wait
# for work keep the cores from those that have some.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

hypothesis.settings.register_profile("any machine", deadline=None)  # one in use is no fault
hypothesis.settings.load_profile("any machine")

SLOW: dict[str, tuple[str, ...]] = {
    "benchmarks/test_scale.py": ("test_all_tables_are_the_commands",),
    "benchmarks/test_throughput.py": (
        "test_it_measures_a_training_step",
        "test_the_stack_to_compare_with_tells_what_it_needs",
        "test_images_take_their_share",
    ),
    "checkpoint/tensors/test_dcp.py": ("test_reads_chunks_of_several_mesh_axes",),
    "checkpoint/test_adapters.py": (
        "test_a_checkpoint_holds_adapters_alone_and_any_layout_resumes",
        "test_another_base_and_other_adapters_are_refused",
    ),
    "checkpoint/test_chat_export.py": ("test_generation_stops_at_the_end_of_a_trained_turn",),
    "checkpoint/test_checkpointer.py": (
        "test_any_layout_resumes_any_other_bit_for_bit",
        "test_damage_is_named_and_auto_falls_back",
    ),
    "checkpoint/test_frozen_tower.py": (
        "test_a_frozen_tower_is_written_once_and_restored_on_any_layout",
        "test_a_tower_that_one_of_both_lacks_is_told_by_the_option_for_it",
        "test_another_choice_takes_the_weights_alone",
    ),
    "checkpoint/test_hf_reader.py": ("test_each_rank_reads_its_part_of_any_directory",),
    "checkpoint/test_runs.py": (
        "test_a_signal_while_a_save_is_under_way",
        "test_five_steps_after_a_move_are_those_of_the_run_that_stayed",
        "test_from_hugging_face_weights_and_out_again",
        "test_killed_at_random_moments",
    ),
    "data/test_check.py": ("test_random_lines_are_right_or_refused",),
    "data/test_fine_tuning.py": ("test_chat_runs_and_resumes_on_another_layout",),
    "data/test_loader.py": (
        "test_a_run_that_fails_does_not_wait_for_its_workers",
        "test_any_source_interrupted_anywhere",
        "test_any_source_on_any_layout_and_resumed_in_the_middle",
        "test_resuming_with_workers",
        "test_the_global_batch_is_the_same_with_workers",
        "test_workers_end_when_their_parent_is_killed",
        "test_workers_outlive_stop_signals_to_the_group_and_end_with_close",
    ),
    "data/test_media_loader.py": ("test_interrupted_anywhere", "test_interrupted_with_workers"),
    "data/test_shuffle.py": ("test_all_orders_of_a_few_are_equally_likely",),
    "models/ops/test_gated_delta_rule.py": (
        "test_equals_recurrence_for_any_documents",
        "test_gradcheck",
        "test_head_shapes_of_the_35b_in_float32",
    ),
    "models/ops/test_grouped_experts.py": ("test_any_width_and_counts",),
    "models/qwen35_moe/test_check_kernels.py": ("test_fla_is_tuned_on_a_long_stream_first", "test_right_kernels_pass"),
    "models/qwen35_moe/test_config.py": ("test_every_value_of_every_key",),
    "models/qwen35_moe/test_parity.py": ("test_equals_transformers", "test_no_further_from_float64_than_transformers"),
    "parallelisms/test_activation_checkpoint.py": (
        "test_selective_makes_no_product_of_the_experts_again",
        "test_a_checkpointed_block_is_one_graph_however_many_documents",
        "test_at_ep_2_all_but_exchanges_is_compiled_and_stays_so",
        "test_the_exchange_of_tokens_for_heads_breaks_no_graph",
    ),
    "parallelisms/test_communication.py": (
        "test_below_a_head_that_alone_trains_nothing_is_gathered_again",
        "test_experts_and_dense_weights_are_gathered_a_block_ahead",
        "test_a_step_communicates_as_documented",
        "test_features_travel_once_each_way",
        "test_the_gradient_norm_is_one_number_over_the_shards",
        "test_the_head_is_gathered_before_the_last_block_computes",
        "test_what_has_no_backward_pass_is_gathered_and_sent_once",
    ),
    "parallelisms/test_context_parallel.py": (
        "test_equals_one_process",
        "test_many_key_heads_and_one",
        "test_with_images_equals_one_process",
    ),
    "parallelisms/test_frozen.py": ("test_a_frozen_part_stays_and_the_rest_trains_as_in_one_process",),
    "parallelisms/test_layouts.py": (
        "test_equals_one_process",
        "test_several_units_of_several_blocks_equal_one_process",
        "test_unequal_routing_equals_one_process",
    ),
    "parallelisms/test_load_balancing_layouts.py": (
        "test_equals_one_process",
        "test_losses_are_in_the_gradient_and_not_in_the_loss",
    ),
    "parallelisms/test_lora_layouts.py": (
        "test_equals_one_process",
        "test_frozen_weights_are_stored_once_as_they_are_computed_with",
    ),
    "parallelisms/test_mtp_layouts.py": ("test_equals_one_process", "test_what_one_process_trains"),
    "parallelisms/test_precision.py": ("test_what_is_float32_under_bfloat16",),
    "parallelisms/test_room.py": (
        "test_a_step_made_anew_is_the_one_that_asks",
        "test_a_step_without_room_is_made_anew_and_there_is_more_afterwards",
        "test_equals_one_process",
        "test_graphs_hold_the_exchanges",
    ),
    "parallelisms/test_vision_layouts.py": ("test_equals_one_process",),
    "parallelisms/test_vision_tower.py": (
        "test_a_block_of_the_tower_is_one_graph_however_many_patches_and_frames",
        "test_a_frozen_tower_adds_no_collective_and_a_trained_one_its_units",
        "test_what_is_frozen_has_no_graph_no_gradient_no_state",
    ),
    "data/test_skipped.py": ("test_the_command_and_the_mended_file",),
    "checkpoint/test_failures.py": (
        "test_a_run_goes_on_after_a_failed_save_and_ends_with_1_after_a_failed_last_one",
        "test_files_that_one_rank_cannot_read_back",
        "test_on_a_small_disk",
        "test_under_a_limit_on_the_size_of_files",
    ),
    "test_clusters.py": (
        "test_killed_ranks_are_started_again_and_go_on",
        "test_kubernetes_variables",
        "test_the_slurm_script_stops_in_time_queues_again_and_finishes",
    ),
    "test_context_parallel_run.py": (
        "test_conversations_with_fillers_and_bad_samples",
        "test_images",
        "test_text_and_its_validation",
    ),
    "test_lora_training.py": ("test_adapters_train_and_resume_on_another_layout",),
    "test_mtp_run.py": (
        "test_a_resume_goes_on_bit_for_bit_and_the_module_belongs_to_the_checkpoint",
        "test_drafts_come_to_fit_a_model_that_had_none",
        "test_one_process_and_two_that_share_rows_or_tokens",
    ),
    "test_reproducibility.py": (
        "test_the_first_losses_are_those_on_record",
        "test_two_deterministic_runs_are_equal_bit_for_bit",
    ),
    "test_run_folder.py": ("test_a_run_says_what_is_in_the_way",),
    "test_run_train.py": (
        "test_a_scheduler_that_starts_several_runs_of_one_process",
        "test_a_signal_reaches_the_ranks_but_not_torchrun",
        "test_two_runs_at_once",
        "test_what_only_a_rank_finds_is_one_line_and_status_2",
    ),
    "test_vision_run.py": (
        "test_a_model_of_100_m_parameters_reloads",
        "test_runs_go_on_from_an_image_text_model",
        "test_transformers_computes_the_same_from_an_export",
    ),
    "test_train.py": (
        "test_bare_torchrun_tells_a_mistake_in_one_line_too",
        "test_four_processes_train_and_transformers_loads_the_result",
        "test_plain_python_is_one_process_and_mistakes_are_one_line",
        "test_resumed_run_is_the_uninterrupted_one_bit_for_bit",
        "test_resumes_on_another_layout",
        "test_sigterm_saves_and_a_second_start_goes_on",
        "test_two_nodes",
    ),
    "test_vision_training.py": ("test_one_process_and_two_and_what_is_frozen",),
    "training/test_compile_cache.py": ("test_the_compiler_writes_there",),
    "training/test_epochs_run.py": ("test_epochs_end_where_it_was_said_and_go_on_on_another_layout",),
    "training/test_distributed.py": (
        "test_beside_a_group_a_process_ends_but_for_pythons_last_act",
        "test_ranks_with_other_options_are_named",
        "test_the_missing_rank_is_named",
    ),
    "training/test_load_balancing.py": ("test_fillers_count_nowhere", "test_nothing_is_measured_that_no_loss_needs"),
    "training/test_nonfinite.py": (
        "test_a_bad_step_is_not_applied_and_all_ranks_say_where",
        "test_a_run_stops_in_one_line_with_its_last_checkpoint_good",
    ),
    "training/test_step.py": (
        "test_a_step_that_misses_rows_and_the_one_launched_behind_it_are_made_anew_in_their_order",
    ),
    "training/test_step_report.py": ("test_a_run_that_tells_late_tells_the_same",),
    "training/test_validation.py": ("test_the_exact_mean_on_any_mesh_and_no_trace_in_the_training",),
    "training/test_memory.py": ("test_what_lies_on_a_rank_and_what_it_communicates_is_what_the_plan_says",),
    "training/test_formulas.py": (
        "test_what_a_layer_keeps_is_as_counted",
        "test_what_is_alive_in_a_layers_backward_pass_is_as_counted",
    ),
    "parallelisms/test_parallelize.py": (
        "test_gradients_outside_fsdp_are_summed_with_the_loss",
        "test_the_parts_of_all_ranks_cover_a_parameter_once",
        "test_weights_are_freed_after_the_forward_pass_where_they_are_sharded",
        "test_weights_are_in_memory_once_as_the_loss_is_computed",
        "test_what_has_no_backward_pass_is_not_kept",
    ),
    "training/test_launch.py": ("test_restarts", "test_statuses"),
    "checkpoint/test_identity.py": ("test_other_data_are_named_or_read_from_their_beginning",),
    "models/qwen35_moe/test_vision.py": ("test_equals_transformers",),
    "parallelisms/test_reduction.py": (
        "test_a_run_is_that_of_fsdps_own_reduction",
        "test_whatever_trains_is_reduced_alike",
    ),
    "test_distributed.py": ("test_ranks_begin_with_everything_imported_and_no_threads",),
    "data/test_epochs.py": ("test_it_goes_on_from_anywhere_on_any_layout_to_the_same_last_step",),
    "models/ops/test_in_graph.py": ("test_a_graph_holds_it_and_computes_the_same",),
    "data/test_tokenize.py": ("test_mistakes",),
    "data/test_samples.py": ("test_weights_are_shares_of_samples",),
}
"""File -> names of tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.nodeid.partition("::")[0].removeprefix("tests/")
        if getattr(item, "originalname", item.name) in SLOW.get(file, ()):
            item.add_marker(pytest.mark.slow)
