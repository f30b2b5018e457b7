#!/usr/bin/python
"""Have a bucket, and prove that it can be written, read, listed and cleaned with the given keys."""

from __future__ import annotations

import secrets
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: s3_bucket
short_description: Have a bucket, and prove that it can be used
description:
  - Creates the bucket when it is not there, then writes, reads, lists and deletes one small object under the prefix.
  - Needs boto3 in the Python that runs it.
options:
  bucket:
    description: Name of the bucket.
    type: str
    required: true
  region:
    description: Region of the bucket.
    type: str
    default: us-east-1
  endpoint:
    description: URL of the S3 service; empty for the provider's own.
    type: str
    default: ""
  access_key:
    description: Access key.
    type: str
    required: true
  secret_key:
    description: Secret key.
    type: str
    required: true
  prefix:
    description: Where in the bucket the object of the proof goes.
    type: str
    default: ""
  timeout_s:
    description: How long a store that has just started may take to answer.
    type: int
    default: 60
"""

ARGUMENTS = {
    "bucket": {"type": "str", "required": True},
    "region": {"type": "str", "default": "us-east-1"},
    "endpoint": {"type": "str", "default": ""},
    "access_key": {"type": "str", "required": True, "no_log": True},
    "secret_key": {"type": "str", "required": True, "no_log": True},
    "prefix": {"type": "str", "default": ""},
    "timeout_s": {"type": "int", "default": 60},
}
PRESENT, ABSENT, FORBIDDEN = "present", "absent", "forbidden"


class BucketError(Exception):
    """The bucket cannot be used; the message says why."""


def plan(state: str, *, bucket: str) -> list[str]:
    """The steps from what a look at the bucket said to a proven bucket. Raises BucketError when there are none."""
    if state == FORBIDDEN:
        raise BucketError(
            f"bucket {bucket} belongs to somebody else, or remote_storage_access_key may not use it: "
            "choose another remote_storage_bucket or other keys"
        )
    return ["create", "prove"] if state == ABSENT else ["prove"]


def look(client, bucket: str, deadline: float) -> str:
    """Whether the bucket is there; waits for a service that is starting."""
    from botocore.exceptions import BotoCoreError, ClientError

    while True:
        try:
            client.head_bucket(Bucket=bucket)
            return PRESENT
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in (404, 403):
                return ABSENT if status == 404 else FORBIDDEN
            problem = str(error)
        except BotoCoreError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise BucketError(f"the object store does not answer: {problem}")
        time.sleep(0.5)


def prove(client, bucket: str, prefix: str, deadline: float) -> None:
    """Write, read, list and delete one object. A store that has just started may refuse writes for a moment."""
    from botocore.exceptions import BotoCoreError, ClientError

    key, content = f"{prefix.strip('/')}/verify-{secrets.token_hex(8)}".lstrip("/"), secrets.token_bytes(64)
    while True:
        try:
            client.put_object(Bucket=bucket, Key=key, Body=content)
            break
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                raise BucketError(f"writing to bucket {bucket} failed: {error}") from error
            time.sleep(0.5)
    try:
        if client.get_object(Bucket=bucket, Key=key)["Body"].read() != content:
            raise BucketError(f"bucket {bucket} returned other bytes than were written to {key}")
        if key not in [item["Key"] for item in client.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents", [])]:
            raise BucketError(f"bucket {bucket} does not list {key}, which was just written")
    except (BotoCoreError, ClientError) as error:
        raise BucketError(f"reading from bucket {bucket} failed: {error}") from error
    finally:
        client.delete_object(Bucket=bucket, Key=key)


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    p = module.params
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        module.fail_json(msg=f"boto3 is missing: run this with the Python of an installed release ({error})")
    options = {"retries": {"max_attempts": 1}, "connect_timeout": 5, "read_timeout": 15}
    options |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    client = boto3.client(
        "s3",
        region_name=p["region"],
        endpoint_url=p["endpoint"] or None,
        aws_access_key_id=p["access_key"],
        aws_secret_access_key=p["secret_key"],
        config=Config(**options, s3={"addressing_style": "path"} if p["endpoint"] else {}),
    )
    deadline = time.monotonic() + p["timeout_s"]
    try:
        steps = plan(look(client, p["bucket"], deadline), bucket=p["bucket"])
        if not module.check_mode:
            if "create" in steps:
                elsewhere = {} if p["endpoint"] or p["region"] == "us-east-1" else {"LocationConstraint": p["region"]}
                client.create_bucket(Bucket=p["bucket"], **({"CreateBucketConfiguration": elsewhere} if elsewhere else {}))
            prove(client, p["bucket"], p["prefix"], deadline)
    except BucketError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed="create" in steps, steps=steps)


if __name__ == "__main__":
    main()
