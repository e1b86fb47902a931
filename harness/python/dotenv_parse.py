"""Reads a file as python-dotenv does, without expanding anything: dotenv_parse.py FILE

Prints a JSON object of names and values.
"""

import json
import sys

from dotenv import dotenv_values

print(json.dumps(dotenv_values(sys.argv[1], interpolate=False)))
