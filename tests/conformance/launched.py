"""One rank of those that torchrun starts: all cases of external_launcher, one engine after the other.

python -m tests.conformance.launched MODELS FOLDER, MODELS a JSON object; what a rank says goes to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.conformance.cases import EXTERNAL, SCENARIOS
from tests.conformance.scenarios import perform

if __name__ == "__main__":
    models, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    said = {str(case): perform(SCENARIOS[case.model], **models[case.model], **case.settings) for case in EXTERNAL}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(said))
