"""Runs for tests that only look at what they leave: without what takes most of their time."""

import os

import pytest


def lighten(patch: pytest.MonkeyPatch) -> None:
    """Have runs wait for no disk and draw no report: no power cut is tested, and nobody reads it."""
    patch.setattr(os, "fsync", lambda _: None)
    patch.setattr("flows.rest_em.publish_report", lambda _: None)
