"""The capture: follow each request to the engine to its end, and record what it generated.

The first instrumented process that sees a request records it: `frontend` in a process that answers (API server, gRPC
server), else `engine_core`. `marks` tells the engine core which requests a frontend records.
"""
