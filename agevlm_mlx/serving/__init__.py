"""The parts of `agevlm serve`.

`api` requests and `replies` answers as JSON; `images` where an image may come from; `exchange`
what goes to the model and what comes back; `prefixes` texts that were read before; `batch` the
model and the rows it answers, for one thread; `engine` that thread and the queue before it,
without HTTP; `app` the routes.
"""
