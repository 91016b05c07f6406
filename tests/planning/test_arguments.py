import pytest

from hf_curriculum_distill.cli import main
from hf_curriculum_distill.planning import PlanArguments


def test_no_student_and_options_that_compare_lacks_are_errors(capsys):
    for argv, message in ((["plan"], "No student is given"), (["compare", "a", "--student", "b"], "unrecognized")):
        with pytest.raises(SystemExit) as error:
            main(argv)
        assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "b300"}, r"gpu is 'b300'; use one of h100, a100, l4, rtx4090, or give --flops_per_second\."),
        ({"gpu": "l4", "measure": 1.0}, r"Both gpu and measure are given; the time follows from one of them\."),
        ({"flops_per_second": 1.0, "measure": 1.0}, r"Both flops_per_second and measure are given"),
        ({"price_per_hour": 2.0}, r"price_per_hour is 2.0, but how many hours is not known; give --gpu"),
        ({"price_per_hour": -2.0, "gpu": "l4"}, r"price_per_hour is -2.0; it must be above 0\."),
        ({"utilisation": 1.1, "gpu": "l4"}, r"utilisation is 1.1; it must be above 0 and at most 1\."),
    ],
)
def test_wrong_options_of_the_machine_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PlanArguments(student="bert-2-64", **options)


def test_a_student_of_causal_lm_is_planned_as_one_of_the_teachers_family():
    assert PlanArguments(student="4-192", task="CausalLM").student == "teacher-4-192"
