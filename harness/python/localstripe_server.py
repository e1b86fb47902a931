"""Runs localstripe on 127.0.0.1 only, without the file that it keeps in /tmp.

    localstripe_server.py PORT
"""

import sys

from aiohttp import web
from localstripe.resources import Store
from localstripe.server import app

Store.dump_to_disk = lambda self: None
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]))
