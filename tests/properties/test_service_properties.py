"""Whatever a path or a variable holds, the service manager reads back what was given."""

import plistlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helena_cli.errors import ConfigurationError
from helena_cli.host import job, unit
from helena_cli.host.launchd import Launchd
from tests.analysed_unit import ODD, Analysed, a_job, needs_systemd


@needs_systemd
@settings(max_examples=30, deadline=None)
@given(
    arguments=st.lists(
        st.text() | st.binary().map(lambda data: data.decode(errors="surrogateescape"))
    )
)
def test_systemd_reads_every_argument_as_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, arguments: list[str]
):
    arguments = [word.replace("\0", "") for word in arguments]
    found = Analysed(unit.text(a_job(*ODD, *arguments)), tmp_path_factory.mktemp("unit"))
    given = ("/bin/true", *ODD, *arguments)
    assert found.command() == [word.encode("utf-8", "surrogateescape") for word in given]


@needs_systemd
@settings(max_examples=30, deadline=None)
@given(value=st.text(), name=st.text(min_size=1))
@example(value="100% $HOME", name="%h")
def test_systemd_reads_every_path_and_variable_as_it_was_given_or_it_is_refused(
    tmp_path_factory: pytest.TempPathFactory, value: str, name: str
):
    folder = f"/folder/_{name.replace('/', '_')}"
    try:
        job.refuse_unwritable(value)
        job.refuse_unwritable(folder)
    except ConfigurationError:
        return
    text = unit.text(a_job(variables={"A": value}, folder=folder))
    found = Analysed(text, tmp_path_factory.mktemp("unit"))
    assert found.values("Environment") == [f"A={value}"]
    assert found.values("WorkingDirectory") == [folder]


@settings(max_examples=100, deadline=None)
@given(
    arguments=st.lists(st.text()),
    variables=st.dictionaries(st.text(min_size=1), st.text()),
    folder=st.text(min_size=1),
)
@example(arguments=["a\r\nb"], variables={}, folder="/")
def test_a_property_list_holds_the_job_as_it_was_given_or_is_refused(
    arguments: list[str], variables: dict[str, str], folder: str
):
    try:
        text = Launchd().text(a_job(*arguments, variables=variables, folder=folder))
    except ConfigurationError:
        assert any(
            not job.has_place(sign)
            for sign in "".join((*arguments, folder, *variables, *variables.values()))
        )
        return
    agent = plistlib.loads(text)
    assert agent["ProgramArguments"] == ["/bin/true", *arguments]
    assert agent["EnvironmentVariables"] == variables
    assert agent["WorkingDirectory"] == folder
