"""The OpenAI-compatible door.

A request's way through it: `wire` reads the body into an `Ask`, `reply` gives its
sequences to the engine and owns them until they end, `bridge` carries tokens from the
engine's thread to the event loop, `choice` turns them into text, `frames` into bytes.
`app` holds the routes, `server` the socket and the signals. Nothing here knows how a
token is computed.
"""
