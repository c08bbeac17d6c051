"""A recipe's choices are those of the code that gets them; neither side imports the other."""

from nemo_bluelm.config.schema import DecodeBackend, DecodeDevice, Oversize
from nemo_bluelm.data.decode import BACKENDS, DEVICES
from nemo_bluelm.data.table import OVERSIZE


def test_choices_agree():
    for choices, values in ((DecodeBackend, BACKENDS), (DecodeDevice, DEVICES), (Oversize, OVERSIZE)):
        assert {choice.value for choice in choices} == set(values)
