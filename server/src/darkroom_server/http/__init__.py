"""The HTTP door: OpenAI's images API beside gRPC, and a page for browsers. Needs the extra `http`.

``server`` opens the port, ``door`` handles one request, ``routes`` answer it, and ``messages``
convert between JSON and the service layer.
"""
