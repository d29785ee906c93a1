import pytest

from mechmisalign.judging.budget import PRICES, Budget, Estimate, Price, Spent, rough_tokens


def test_dollars_are_per_million_tokens():
    assert Price(2.5, 10.0).dollars(1_000_000, 100_000) == pytest.approx(3.5)


@pytest.mark.parametrize(
    "limit", [{"dollars": -1.0}, {"calls": -1}, {"tokens": -5}, {"dollars": float("nan")}, {"dollars": float("inf")}]
)
def test_a_budget_is_a_number_of_zero_or_more(limit):
    with pytest.raises(ValueError, match="zero or more"):
        Budget(**limit)


def test_a_budget_tells_its_limits():
    assert str(Budget(dollars=5, calls=1000)) == "$5 and 1,000 calls"
    assert str(Budget()) == "no limit"


def test_calls_stop_at_the_limit_and_stay_stopped():
    spent = Spent(Budget(calls=2), None)
    assert [spent.begin(10, 1) for _ in range(4)] == [True, True, False, False]
    assert (spent.calls, spent.exhausted) == (2, True)


def test_calls_in_flight_count_at_their_estimate_and_then_at_what_they_used():
    spent = Spent(Budget(tokens=100), Price(1.0, 1.0))
    assert spent.begin(60, 10)
    spent.settle((60, 10), (20, 1))
    assert spent.begin(60, 10)
    assert not spent.begin(60, 10)
    assert (spent.tokens_in, spent.tokens_out) == (80, 11)
    assert spent.dollars == pytest.approx(91e-6)


def test_dollars_without_a_price_are_unknown():
    assert Spent(Budget(), None).dollars is None


def test_a_budget_of_zero_allows_nothing():
    assert not Spent(Budget(dollars=0.0), Price(1.0, 1.0)).begin(1, 1)
    assert not Spent(Budget(calls=0), None).begin(1, 1)


def test_an_estimate_is_one_readable_line():
    line = str(Estimate(2000, 1600, 640_000, 1600, 1.616, 50.0))
    assert (
        line
        == "2,000 judgements, 1,600 calls to make, about 640,000 tokens in and at most 1,600 out, about $1.62, about 50 s"
    )
    assert "price unknown" in str(Estimate(1, 1, 1, 1, None, 0.0))


def test_rough_tokens_grow_with_the_bytes_of_a_text():
    assert rough_tokens("") < rough_tokens("word " * 100) < rough_tokens("слово " * 100)
    assert rough_tokens("a" * 4000) == pytest.approx(1000, rel=0.02)


def test_known_prices_are_positive_and_named_as_inspect_names_models():
    assert all(price.input > 0 and price.output > 0 and "/" in name for name, price in PRICES.items())
