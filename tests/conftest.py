from hypothesis import settings

from tests.s3_server import server as server

settings.register_profile("shared machine", deadline=None)  # what an example takes says nothing here
settings.load_profile("shared machine")
