"""Run folders at a URL of fsspec (`gs://`, `s3://`, ...): a local folder and its copy in whole states.

A run always works in a local folder. `Mirror` brings down what the URL holds when the run starts, and after every
checkpoint puts a *state* of the folder there. At the URL there are

- `files/NAME.DIGEST`: files, under a name that follows from their content, and never written over;
- `states/NUMBER.json`: states. Each lists all files of the folder with size and SHA-256, and has a checksum of its own.
  It is written in one piece, after all that it lists. Two are kept;
- `claim.json`: who writes there.

A reader takes the newest state that is whole. What no state lists does not exist for it.
"""
