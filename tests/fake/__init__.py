"""Tests on a device that is not there."""
