from hypothesis import settings

from tests.attackers import papers as papers
from tests.attackers import security as security
from tests.attackers import stack as stack
from tests.s3_proxy import proxy as proxy
from tests.s3_proxy import weed as weed
from tests.s3_server import server as server

settings.register_profile("shared machine", deadline=None)  # what an example takes says nothing here
settings.load_profile("shared machine")
