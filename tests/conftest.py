"""Fixtures that the whole suite shares."""

pytest_plugins = ["pytester"]
