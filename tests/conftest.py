from tests.s3_server import server as server
