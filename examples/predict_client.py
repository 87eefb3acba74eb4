"""Ask a server for a prediction.

    python examples/predict_client.py photo.jpg --adapter birds

The server is started by ``iconformer serve``. A request is sent again if a copy of the model died, if too many requests
wait, or if the server is being replaced, which answers without JSON. Needs the package ``requests``.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import time
from pathlib import Path

import requests

TRIES = 5


def predict(server: str, adapter: str, image: Path, token: str | None = None, **options: object) -> dict:
    """Predict on an image file.

    Args:
        server: Address of the server, such as ``http://127.0.0.1:8000``.
        adapter: Name of the adapter.
        image: JPEG, PNG, WebP or BMP file.
        token: Bearer token, if the server needs one.
        **options: ``score``, ``top_k``, ``maps``, ``picture``.

    Raises:
        RuntimeError: The server refuses the request, with its reason.
        requests.ConnectionError: No server answers.
    """
    headers = {} if token is None else {'Authorization': f'Bearer {token}'}
    body = dict(image=base64.b64encode(image.read_bytes()).decode('ascii'), options=options)
    for wait in [2**n / 4 for n in range(TRIES)]:
        response = requests.post(f'{server}/v1/predict/{adapter}', json=body, headers=headers, timeout=60)
        is_json = response.headers.get('Content-Type', '').startswith('application/json')
        if response.status_code == 429 or response.status_code >= 500 or not is_json:
            time.sleep(wait)
            continue
        content = response.json()
        if response.ok:
            return content
        raise RuntimeError(f'{content["error"]["code"]}: {content["error"]["message"]}')
    raise RuntimeError(
        f'no answer after {TRIES} tries; the last status was {response.status_code}: {response.text[:300]}'
    )


def main() -> None:
    """Ask, print the answer, and write the drawing if one is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('image', type=Path)
    parser.add_argument('--adapter', required=True)
    parser.add_argument('--server', default='http://127.0.0.1:8000')
    parser.add_argument('--picture', type=Path, help='PNG file to write, with the prediction drawn')
    args = parser.parse_args()
    try:
        answer = predict(
            args.server,
            args.adapter,
            args.image,
            os.environ.get('ICONFORMER_MM_TOKEN'),
            picture=args.picture is not None,
            maps=False,
        )
    except (RuntimeError, OSError) as error:
        sys.exit(f'error: {error}')
    if args.picture is not None:
        args.picture.write_bytes(base64.b64decode(answer.pop('picture')))
    print(json.dumps(answer, indent=1))


if __name__ == '__main__':
    main()
