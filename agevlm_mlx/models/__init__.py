"""The model. Letters used for shapes everywhere in this package:

B batch, T text tokens, S vision tokens, N query heads, K key/value heads, H head dim,
D language-model width, Dv vision width, V vocabulary, Hi Wi pixels, Gh Gw token grid,
R texts per image, P guided (query) rows, L layers that look at the image.
Images are NHWC; boolean masks are True where attention is allowed.
"""
