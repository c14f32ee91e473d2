"""Recipes, files and overrides become one validated config; every mistake is named with its key and its cure."""

import math
import re

import pytest
import yaml

from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import dump_config, load_config, override_config, recipe_names
from rlsf_ray.errors import InputError


def test_every_recipe_loads_and_bears_its_own_name() -> None:
    assert recipe_names() == [
        "deep_self_evolving",
        "evolve",
        "format_only",
        "length_matched",
        "majority_pairs",
        "random_pairs",
        "reflect_retry_reward",
        "reversed_pairs",
        "rlif_majority",
        "rlif_self_certainty",
        "rlif_token_entropy",
        "rlif_trajectory_entropy",
        "rlsf",
        "rlsf_best_worst",
        "rlsf_paper",
        "rlsf_reward_model",
        "score_first",
        "score_second",
        "self_rewarding_correction",
        "try_again",
    ]
    assert [load_config(name).recipe for name in recipe_names()] == recipe_names()


def test_the_paper_recipe_has_the_authors_numbers() -> None:
    config = load_config("rlsf_paper")
    assert (config.rollout.name, config.rollout.traces, config.data.answer) == ("cot_decoding", 10, "elicit")
    assert (config.pairs.rule, config.pairs.min_chosen, config.pairs.max_pairs) == ("all_above", 0.9, None)
    assert (config.pairs.same_answer, config.pairs.weight) == (True, "one")
    assert (config.loss.beta, config.loss.label_smoothing, config.loss.nll) == (0.2, 0.01, 0.0)
    assert (config.learner.learning_rate, config.learner.epochs) == (5e-5, 5)


def test_recipes_differ_from_rlsf_only_where_they_say_so() -> None:
    default, best_worst = load_config("rlsf"), load_config("rlsf_best_worst")
    assert best_worst.pairs.rule == "best_worst"
    assert best_worst.model_copy(update={"pairs": default.pairs, "recipe": "rlsf"}) == default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rollout.name=sample"], "signal=passed is for rollouts of several turns, got rollout.name=sample"),
        (["signal=mean_logprob"], "signal=mean_logprob is about all tokens of a trace"),
        (["model.chat=plain"], "needs a chat template"),
        (["advantages.turns=[reflexion]"], r"no turn has the role 'reflexion'.*did you mean 'reflection'"),
        (["advantages.held_turns=[reflection]"], "name a role twice"),
        (["rollout.name=verify_refine"], "rollout.name=verify_refine checks none"),
        (["rollout.name=refine"], "advantages need traces that the policy draws"),
        (["advantages.held_turns=[attempt]", "advantages.kl=0"], "held_turns feel the KL penalty only"),
        (["advantages.turns=[]"], "uncredited_temperature is for turns beside"),
    ],
)
def test_rollouts_of_several_turns_are_checked_with_what_learns_from_them(changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config("reflect_retry_reward", changes)


@pytest.mark.parametrize("change", ["rollout.name=sample", "rollout.traces=7"])
def test_final_over_first_needs_drafts_and_their_refined_answers(change: str) -> None:
    with pytest.raises(InputError, match=r"final_over_first.*rollout\.name: refine and an even number"):
        load_config("evolve", [change])


def test_dumped_config_loads_back_equal(tmp_path) -> None:
    config = load_config("rlsf", ["seed=7", "loss.beta=0.25", "pairs.max_pairs=null"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_the_guard_can_be_off_although_yaml_reads_that_as_false(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: rlsf\nguard: off\n")
    for config in (load_config("rlsf", ["guard=off"]), load_config(str(file), [])):
        assert config.guard == "off"
        file.write_text(dump_config(config))
        assert load_config(str(file), []).guard == "off"
        file.write_text("base: rlsf\nguard: off\n")


def test_overrides_reach_sections_and_list_items_and_the_last_one_wins() -> None:
    config = load_config("rlsf", ["data.train.0.count=5", "seed=1", "seed=2", "learner.learning_rate=1e-4"])
    assert (config.data.train[0].count, config.data.train[1].count) == (5, 355)
    assert config.seed == 2
    assert config.learner.learning_rate == 1e-4  # YAML reads 1e-4 as text; the config makes it a number
    assert override_config(config, ["rounds=3"]).rounds == 3


def test_a_file_builds_on_a_recipe_by_deep_merge(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: rlsf_paper\nloss: {beta: 0.5}\n")
    config = load_config(str(path))
    assert config.recipe == "mine"
    assert (config.loss.beta, config.loss.label_smoothing) == (0.5, 0.01)


def test_a_file_may_build_on_a_file_beside_it(tmp_path) -> None:
    (tmp_path / "below.yaml").write_text("base: rlsf\nseed: 5\n")
    (tmp_path / "above.yaml").write_text("base: below.yaml\nrounds: 4\n")
    config = load_config(str(tmp_path / "above.yaml"))
    assert (config.recipe, config.seed, config.rounds) == ("above", 5, 4)


def test_a_circle_of_bases_is_refused(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(InputError, match="circle"):
        load_config(str(tmp_path / "a.yaml"))


def test_relative_data_paths_become_absolute_and_urls_stay(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    sources = ["data.train=[{kind: file, path: a.jsonl}, {kind: file, path: 's3://b/c.jsonl'}]", "model.name=model"]
    config = load_config("rlsf", sources)
    assert [source.path for source in config.data.train] == [str(tmp_path / "a.jsonl"), "s3://b/c.jsonl"]
    assert config.model.name == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("losss.beta=1", r"unknown key losss: .*did you mean 'loss'"),
        ("loss.betta=1", r"unknown key loss.betta: .*did you mean 'beta'"),
        ("data.train.0.cuont=1", r"unknown key data.train.0.cuont: .*did you mean 'count'"),
        ("loss.name=dop", r"loss.name: .*got 'dop'; did you mean 'dpo'"),
        ("signal=disparty", r"signal: no signal is called 'disparty'; expected .*did you mean 'disparity'"),
        ("pairs.rule=best_wurst", r"pairs.rule: .*did you mean 'best_worst'"),
        ("rollout.name=sampl", r"rollout.name: .*did you mean 'sample'"),
        ("data.answer=nubmer", r"data.answer: .*did you mean 'number'"),
        ("data.answer='regex:('", r"data.answer: the regex: pattern does not compile"),
        ("rounds=0", r"rounds: input should be greater than 0, got 0"),
        ("rollout.traces=1", r"rollout.traces: .*greater than or equal to 2, got 1"),
        ("cluster.generators.count=-1", r"cluster.generators.count: .*got -1"),
        ("learner.learning_rate=.nan", r"learner.learning_rate: .*finite"),
        ("rounds=two", r"rounds: .*integer.*got 'two'"),
        ("data.train=[]", r"data.train: .*at least 1 item"),
        ("data.train.0.count=null", r"data.train.0: .*needs `count`, got none; set count"),
        ("data.train.0.name=null", r"data.train.0: .*needs `name`, got none"),
        ("data.train.7.count=1", r"data.train is a list of 2, expected an index from 0 to 1, got '7'"),
        ("rounds.x=1", r"rounds is a single value and has no key 'x'"),
        ("rounds", r"expected key=value such as .*got 'rounds'"),
        ("loss.beta=[1", r"not valid YAML"),
        ("cluster.trainers={count: 2, gpus: 0.5}", r"whole number .*got 0.5 for 2; set it to 1"),
    ],
)
def test_a_wrong_override_is_an_input_error_that_names_key_and_cure(override, expected) -> None:
    with pytest.raises(InputError, match=expected):
        load_config("rlsf", [override])


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(InputError) as caught:
        load_config("rlsf", ["rounds=0", "loss.beta=-1"])
    assert "rounds:" in str(caught.value)
    assert "loss.beta:" in str(caught.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'rlsf_paper'"):
        load_config("rlsf_papr")


@pytest.mark.parametrize("text", ["- 1\n", "just words\n", "a: [\n", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(InputError, match=r"broken\.yaml"):
        load_config(str(tmp_path / "broken.yaml"))


def test_a_users_own_function_is_accepted_by_its_form() -> None:
    assert load_config("rlsf", ["signal=my_package.signals:mine"]).signal == "my_package.signals:mine"


def test_the_known_rollouts_are_those_of_the_functions() -> None:
    from rlsf_ray.config_sections import ROLLOUT_NAMES
    from rlsf_ray.rollouts.programs import ROLLOUTS

    assert set(ROLLOUTS) == set(ROLLOUT_NAMES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["signal=mean_logprob"], "use answer_prob, or pairs.rule=best_worst"),
        (["loss.name=ipo", "loss.label_smoothing=0.1"], "ipo has no label smoothing"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config("rlsf", settings)


def test_no_default_is_infinite_and_the_config_stays_small() -> None:
    """Style: at most 72 fields of the tree have a reader; sections are not counted."""

    def leaves(value: object) -> list[object]:
        return [leaf for inner in value.values() for leaf in leaves(inner)] if isinstance(value, dict) else [value]

    values = leaves(yaml.safe_load(dump_config(load_config("rlsf"))))
    assert len(values) <= 72
    assert all(math.isfinite(value) for value in values if isinstance(value, float))
    assert RunConfig.model_config["extra"] == "forbid"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.name=cot_decoding", "advantages={}"], "advantages need traces that the policy draws"),
        (["judges=[live, live]"], "name each once"),
        (["reward_model={}"], "set advantages: {}"),
        (["rollout.temperature=1.0", "advantages={}", "reward_model={rounds: 3}"], "got 3 of rounds=3"),
        (
            ["rollout.temperature=1.0", "advantages={}", "reward_model={}", "cluster.max_staleness=1"],
            "max_staleness: 0",
        ),
        (["rollout.temperature=1.0", "advantages={}", "pairs.min_chosen=1.0"], "does nothing"),
        (["rollout.temperature=1.0", "advantages={}", "loss.beta=0.2"], "does nothing"),
        (["signal=self_consistency", "judges=[frozen]"], "asks no model"),
    ],
)
def test_advantages_and_reward_models_refuse_what_they_cannot_work_with(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        load_config("rlsf", overrides)


def test_a_run_with_a_reward_model_changes_what_it_learns_from() -> None:
    config = load_config("rlsf_reward_model")
    assert [config.trains_reward(round) for round in (0, 1, 2)] == [True, True, False]
    assert [config.has_pairs(round) for round in (0, 1, 2)] == [True, True, False]
    assert [config.examples_per_step(round) for round in (1, 2)] == [8, 128]
    assert [config.epochs(round) for round in (1, 2)] == [3, 1]


def test_the_surest_share_of_a_round_is_a_number_of_prompts() -> None:
    config = load_config("rlsf")
    assert [config.most_prompts(0, size) for size in (120, 30, 1)] == [20, 5, 1]  # never none
    assert load_config("random_pairs").most_prompts(0, 120) is None
    assert load_config("rlsf_reward_model", ["pairs.surest=0.5"]).most_prompts(2, 64) is None  # of advantages
    with pytest.raises(InputError, match=r"set pairs\.surest: null"):
        load_config("random_pairs", ["pairs.surest=0.5"])
