"""The control node's half of neon_install: ask what is missing, send only that, have it unpacked.

Invariant: an artifact that the host has whole is never sent, so a second run costs one question.
"""

from typing import Any

from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Runs the module twice when something is missing, once otherwise."""

    TRANSFERS_FILES = True
    _requires_connection = True
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        try:
            answer = self._execute_module(module_name="neon_install", module_args=arguments, task_vars=task_vars)
            missing = answer.get("missing", [])
            if answer.get("failed") or not missing:
                return answer
            if self._task.check_mode:
                return {**answer, "changed": True}
            remote = self._make_tmp_path()
            sent = {}
            for number, artifact in enumerate(arguments["artifacts"]):
                if artifact["dest"] in missing:
                    sent[artifact["dest"]] = self._transfer_file(
                        str(artifact["archive"]), self._connection._shell.join_path(remote, f"artifact{number}")
                    )
            return self._execute_module(
                module_name="neon_install", module_args={**arguments, "sent": sent}, task_vars=task_vars
            )
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
