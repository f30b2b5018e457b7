"""Names, numbers and subnets: what is free stays free, what is taken is never given twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.naming import Address, checked_name, free_numbers, free_subnet, hosts_file, split_list
from lab.shell import LabError


@pytest.mark.parametrize("name", ["a", "sk1", "molecule-cluster", "a1-b2-c3", "a" * 24])
def test_good_names(name: str) -> None:
    assert checked_name("host", name) == name


@pytest.mark.parametrize("name", ["", "1a", "A", "a_b", "a.b", "../x", "a--b", "-a", "a-", "a b", "a" * 33, "é"])
def test_bad_names_are_refused_by_name(name: str) -> None:
    with pytest.raises(LabError, match="host name"):
        checked_name("host", name)


@given(st.sets(st.integers(0, 255), max_size=255))
def test_a_free_subnet_is_not_taken(thirds: set[int]) -> None:
    taken = [f"10.203.{third}" for third in thirds]
    assert free_subnet(taken) not in taken


def test_no_subnet_left() -> None:
    with pytest.raises(LabError, match="destroy a lab"):
        free_subnet(f"10.203.{third}" for third in range(256))


@given(st.sets(st.integers(11, 249), max_size=100))
def test_new_hosts_get_numbers_that_nobody_has(taken: set[int]) -> None:
    numbers = free_numbers(taken)
    given_out = [next(numbers) for _ in range(100)]
    assert len({*given_out, *taken}) == len(given_out) + len(taken)
    assert all(11 <= number <= 249 for number in given_out)


def test_a_full_lab_says_so() -> None:
    with pytest.raises(LabError, match="239 hosts"):
        next(free_numbers(range(11, 250)))


def test_an_interface_name_fits() -> None:
    address = Address("10.203.7", 249)
    assert (address.ip, address.gateway) == ("10.203.7.249", "10.203.7.1")
    assert len(address.port) <= 15


def test_hosts_file_and_lists() -> None:
    assert hosts_file([("a", "10.0.0.1")]).splitlines() == ["127.0.0.1 localhost", "::1 localhost", "10.0.0.1 a"]
    assert split_list("a,b c,,d") == ["a", "b", "c", "d"]
    assert split_list(None) == []
