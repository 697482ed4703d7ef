"""Regions that come, leave, die and lag, started as a person would start them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.process import Job, Lines
from tests.e2e.cluster import SMALL, Cluster, RegionProcess, children, kill
