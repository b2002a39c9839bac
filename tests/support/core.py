"""The core: about a hundred quick tests for every Python and every torch (`pytest -m core`, and `nox -s core`).

Of each file the functions by name, all of their parameters; or one parameter of a function, as pytest writes it.
Only the standard library is imported here, so that noxfile.py can read the list.
"""

from __future__ import annotations

CASES = (
    "plain", "one query", "one key", "GQA", "GQA decode", "MQA", "batch = heads = lengths = dims", "wide v", "odd head dims",
    "scale given", "scale 0", "causal", "causal, more queries", "causal, one query", "bottom right, more keys",
    "torch's lower right", "bool mask", "padding mask", "float mask", "mask and causal", "bias and causal",
)  # fmt: skip
TRANSFORMS = ("vmap", "grad", "vjp", "functionalize", "make_fx", "jit.trace")
MODES = ("function mode", "dispatch mode", "fake mode", "dual level")
OTHERS = ("dtype", "requires_grad", "subclass")
OPTIONS = ("softcap and mask", "window, causal", "lse, causal")

CORE: dict[str, tuple[str, ...]] = {
    "tests/dispatch/test_semantics.py": (
        *(f"test_every_case[backward-{case}]" for case in CASES),
        *(f"test_every_candidate[{case}-bfloat16]" for case in ("plain", "GQA decode", "mask and causal")),
        "test_fault_02_rows_that_see_nothing_are_zeros_with_zero_gradients",
        "test_gradients_of_views",
        "test_packed_qkv_as_one_tensor",
        "test_fault_31_autocast_unites_mixed_dtypes_and_spares_float64",
    ),
    "tests/dispatch/test_options.py": tuple(f"test_every_option[{option}-GQA-float32]" for option in OPTIONS),
    "tests/dispatch/test_circumstances.py": (
        "test_an_ordinary_call_is_tuned_and_remembered",
        "test_every_row_has_an_expected_action",
        "test_a_spent_budget",
        "test_inside_sdpa_kernel_nothing_is_learnt",
        "test_a_switched_off_backend_removes_that_kernel_and_nothing_else",
        *(f"test_fault_29_inside_a_transform[armed-{transform}]" for transform in TRANSFORMS),
        "test_jvp_and_dual_tensors",
        "test_make_fx_with_fake_tensors",
        "test_fake_tensors",
        "test_meta_tensors",
        "test_deterministic_mode",
        "test_fault_28_export",
        "test_nested_tensors_that_are_not_jagged",
        "test_empty_inputs",
    ),
    "tests/dispatch/test_guard.py": (
        "test_the_same_and_fresh_tensors_hit",
        *(f"test_another_kind_of_tensor_misses[{guard}-{o}-q]" for guard in ("native", "plain") for o in OTHERS),
        *(f"test_a_mode_misses_and_hits_again_after_it[native-{mode}]" for mode in MODES),
        "test_deterministic_mode_both_ways",
        "test_the_default_obeys_sdpa_kernel_on_a_hit",
    ),
    "tests/dispatch/test_patching.py": ("test_tuned_sdpa_is_within_budget[bool-float16]",),
    "tests/dispatch/test_compile.py": ("test_the_stored_winner_stands_in_the_graph",),
    "tests/environment/test_private_names.py": ("test_every_row_is_a_name_of_this_torch",),
    "tests/environment/test_option_scope.py": ("test_a_scope_is_no_change_of_the_process[with options]",),
    "tests/process/test_imports.py": (
        "test_fault_63_import_loads_only_itself_and_the_standard_library",
        "test_every_public_name_is_there_and_documented",
        "test_dir_shows_what_is_public_and_nothing_else",
        "test_imports_point_down",
    ),
    "tests/tuning/test_tuning.py": (
        "test_the_fastest_wins_and_every_trial_has_a_time_or_a_reason",
        "test_fault_35_tuning_leaves_torchs_random_numbers_alone",
    ),
    "tests/verdicts/test_store.py": (
        "test_a_verdict_comes_back_whole",
        "test_a_later_verdict_replaces_the_file",
        "test_clear_deletes_our_files_and_nothing_else",
        "test_fault_42_another_schema_is_another_directory",
        "test_fault_54_files_and_directories_are_for_this_user_alone",
        "test_a_manifest_comes_back_whole",
        "test_a_manifest_serves_before_the_store",
    ),
}
