"""What ``agevlm analyze`` measures: does a model tell a matching caption from another, and does
it look where the words are?"""
