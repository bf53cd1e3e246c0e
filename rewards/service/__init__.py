"""The rewards as a service: one native API, and the HTTP contracts that other trainers already speak.

`app.py` is the API itself, `gate.py` what every request passes first, `backend.py` who does the work behind it,
`deploy.py` the same on Ray Serve. One file per contract: `openrlhf.py`, `slime.py`, `verl.py`, `open_instruct.py`,
`nemo_gym.py`.
"""
