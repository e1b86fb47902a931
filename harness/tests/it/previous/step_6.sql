-- What the migrations up to step 6 had made before tables had names of their own, with SQLite's types.
CREATE TABLE seaql_migrations (
    version varchar NOT NULL PRIMARY KEY, applied_at integer NOT NULL
);
INSERT INTO seaql_migrations VALUES
    ('m20261123_000001_stripe_subscription', 1795952665),
    ('m20261123_000002_orphaned_payment', 1795952665),
    ('m20261123_000003_signal_outbox', 1795952665),
    ('m20261123_000004_due_check', 1795952665),
    ('m20261124_000005_replay', 1795952665),
    ('m20261125_000006_room_to_update', 1795952665);
CREATE TABLE stripe_subscription (
    stripe_subscription_id text NOT NULL PRIMARY KEY, stripe_customer_id text, client_reference_id text,
    checkout_session_id text, status text, created timestamp_with_timezone_text,
    start_date timestamp_with_timezone_text, cancel_at timestamp_with_timezone_text,
    canceled_at timestamp_with_timezone_text, cancel_at_period_end boolean NOT NULL,
    current_period_start timestamp_with_timezone_text, current_period_end timestamp_with_timezone_text,
    trial_end timestamp_with_timezone_text, ended_at timestamp_with_timezone_text, items jsonb_text NOT NULL,
    metadata jsonb_text NOT NULL, subscription_metadata jsonb_text NOT NULL, livemode boolean NOT NULL,
    stripe_account_id text, uncertain boolean NOT NULL, revision integer NOT NULL, version integer NOT NULL,
    last_event_id text, last_event_created timestamp_with_timezone_text, merge_state text NOT NULL,
    dt_created timestamp_with_timezone_text NOT NULL, dt_last_updated timestamp_with_timezone_text NOT NULL
);
CREATE TABLE orphaned_payment (
    id text NOT NULL PRIMARY KEY, checkout_session_id text, stripe_customer_id text,
    stripe_subscription_id text, customer_email text, reason text NOT NULL, event_id text NOT NULL,
    livemode boolean NOT NULL, resolved_at timestamp_with_timezone_text, resolved_client_reference_id text,
    dt_created timestamp_with_timezone_text NOT NULL, dt_last_updated timestamp_with_timezone_text NOT NULL
);
CREATE TABLE signal_outbox (
    id integer NOT NULL PRIMARY KEY AUTOINCREMENT, shard integer NOT NULL, entity_id text NOT NULL,
    subject text NOT NULL, message_id text NOT NULL, event_created integer NOT NULL, traceparent text,
    body text NOT NULL, dt_created timestamp_with_timezone_text NOT NULL
);
CREATE TABLE signal_shard (
    shard integer NOT NULL PRIMARY KEY
);
INSERT INTO signal_shard VALUES
    (0), (1), (2), (3), (4), (5), (6), (7), (8), (9), (10), (11), (12), (13), (14), (15);
CREATE TABLE due_check (
    entity_id text NOT NULL, kind text NOT NULL, due_at timestamp_with_timezone_text NOT NULL,
    attempts integer NOT NULL, checkout_session_id text, stripe_customer_id text, stripe_subscription_id text,
    stripe_account_id text, client_reference_id text, is_paid boolean NOT NULL, livemode boolean NOT NULL,
    event_id text NOT NULL, event_type text NOT NULL, event_created integer NOT NULL,
    stream_sequence integer NOT NULL, PRIMARY KEY (entity_id, kind)
);
CREATE TABLE replay (
    name text NOT NULL PRIMARY KEY, signals text NOT NULL, first_sequence integer NOT NULL,
    last_sequence integer NOT NULL, event_types text NOT NULL, stripe_subscription_id text,
    dt_started timestamp_with_timezone_text NOT NULL, dt_beat timestamp_with_timezone_text NOT NULL,
    dt_finished timestamp_with_timezone_text
);
CREATE TABLE signal_due (
    entity_id text NOT NULL, subject text NOT NULL, replay text NOT NULL, told text,
    unchanged boolean NOT NULL, event_id text NOT NULL, event_type text NOT NULL,
    event_created integer NOT NULL, dt_created timestamp_with_timezone_text NOT NULL,
    PRIMARY KEY (entity_id, subject)
);
CREATE INDEX stripe_subscription_stripe_customer_id ON stripe_subscription (stripe_customer_id);
CREATE INDEX stripe_subscription_client_reference_id ON stripe_subscription (client_reference_id);
CREATE INDEX signal_outbox_shard_id ON signal_outbox (shard, id);
CREATE INDEX due_check_due_at ON due_check (due_at);
CREATE INDEX signal_due_replay ON signal_due (replay, entity_id);
