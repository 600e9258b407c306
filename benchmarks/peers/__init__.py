"""Scripts that measure other projects, each run by the Python of that project's own environment.

They import the measured project, torch, datasets and the standard library, and nothing of this one (`ours`, which is
measured beside them, aside); each prints one line of JSON. Those that train, `NAME_train`, `textbook`, `bare_encoder` and
`ours`, share `steps`; `environments` makes the environments and runs them. `saelens_collect`, `saelens_stream` and
`saelens_evaluate` want an environment made with

    python3 -m venv saelens
    saelens/bin/pip install torch==2.13.0
    echo torch==2.13.0 > keep.txt
    saelens/bin/pip install -c keep.txt sae-lens transformer-lens
"""
