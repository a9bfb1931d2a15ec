SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
CREATE SCHEMA darkroom;
SET default_tablespace = '';
SET default_table_access_method = heap;
CREATE TABLE darkroom.inputs (
    digest text NOT NULL,
    bytes bigint NOT NULL,
    data bytea NOT NULL
);
CREATE TABLE darkroom.job_inputs (
    job bigint NOT NULL,
    digest text NOT NULL
);
CREATE TABLE darkroom.jobs (
    id bigint NOT NULL,
    caller text NOT NULL,
    request_id text NOT NULL,
    fingerprint bytea NOT NULL,
    record bytea NOT NULL,
    model text NOT NULL,
    counted_as text NOT NULL,
    detached boolean NOT NULL,
    goal double precision NOT NULL,
    accepted_at double precision NOT NULL,
    queued_at double precision NOT NULL,
    deadline double precision,
    state smallint NOT NULL,
    owner bigint,
    epoch integer NOT NULL,
    losses integer DEFAULT 0 NOT NULL,
    extended boolean DEFAULT false NOT NULL,
    ended_at double precision,
    failure text,
    runtime text,
    needs text[] DEFAULT '{}'::text[] NOT NULL
)
WITH (fillfactor='70', autovacuum_vacuum_scale_factor='0.02', autovacuum_vacuum_threshold='1000', autovacuum_vacuum_cost_delay='0');
ALTER TABLE darkroom.jobs ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME darkroom.jobs_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE darkroom.ledger (
    id uuid DEFAULT gen_random_uuid() NOT NULL,
    version integer NOT NULL,
    oldest integer NOT NULL
);
CREATE TABLE darkroom.servers (
    id bigint NOT NULL,
    name text NOT NULL,
    lock integer NOT NULL,
    address text NOT NULL,
    key text NOT NULL,
    certificate bytea NOT NULL,
    models text[] NOT NULL,
    opened_at double precision NOT NULL,
    renewed_at double precision NOT NULL,
    runtimes text[] DEFAULT '{}'::text[] NOT NULL,
    held text[] DEFAULT '{}'::text[] NOT NULL,
    offers text[]
)
WITH (fillfactor='50', autovacuum_vacuum_threshold='500');
ALTER TABLE darkroom.servers ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME darkroom.servers_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE SEQUENCE darkroom.session_locks
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
    CYCLE;
INSERT INTO darkroom.inputs VALUES ('digest', 9, '\x612070696374757265');
INSERT INTO darkroom.job_inputs VALUES (1, 'digest');
INSERT INTO darkroom.jobs OVERRIDING SYSTEM VALUE VALUES (1, 'ada', 'waits', '\x73616d65', '\x7265636f7264206f66207761697473', 'demo', 'ada', false, 1796005224.355218, 1796005223.355218, 1796005223.355218, NULL, 0, NULL, 1, 0, false, NULL, NULL, NULL, '{"adapter night of demo"}');
INSERT INTO darkroom.jobs OVERRIDING SYSTEM VALUE VALUES (2, 'ada', 'runs', '\x73616d65', '\x7265636f7264206f662072756e73', 'demo', 'ada', false, 1796005224.358087, 1796005223.358087, 1796005223.358087, NULL, 1, 1, 1, 0, false, NULL, NULL, 'fast', '{}');
INSERT INTO darkroom.jobs OVERRIDING SYSTEM VALUE VALUES (3, 'ada', 'done', '\x73616d65', '\x7265636f7264206f6620646f6e65', 'demo', 'ada', false, 1796005224.358707, 1796005223.358707, 1796005223.358707, NULL, 2, 1, 1, 0, false, 1796005223.359694, NULL, NULL, '{}');
INSERT INTO darkroom.ledger VALUES ('cd285c3a-68aa-42ac-a4df-7bb7baa834f2', 3, 1);
INSERT INTO darkroom.servers OVERRIDING SYSTEM VALUE VALUES (1, 'old', 1, '', '', '\x', '{demo}', 1796005223.330652, 1796005223.335115, '{fast}', '{demo}', '{"adapter night of demo"}');
SELECT pg_catalog.setval('darkroom.jobs_id_seq', 3, true);
SELECT pg_catalog.setval('darkroom.servers_id_seq', 1, true);
SELECT pg_catalog.setval('darkroom.session_locks', 1, true);
ALTER TABLE ONLY darkroom.inputs
    ADD CONSTRAINT inputs_pkey PRIMARY KEY (digest);
ALTER TABLE ONLY darkroom.job_inputs
    ADD CONSTRAINT job_inputs_pkey PRIMARY KEY (job, digest);
ALTER TABLE ONLY darkroom.jobs
    ADD CONSTRAINT jobs_caller_request_id_key UNIQUE (caller, request_id);
ALTER TABLE ONLY darkroom.jobs
    ADD CONSTRAINT jobs_pkey PRIMARY KEY (id);
ALTER TABLE ONLY darkroom.servers
    ADD CONSTRAINT servers_pkey PRIMARY KEY (id);
CREATE INDEX job_inputs_digest ON darkroom.job_inputs USING btree (digest);
CREATE INDEX jobs_claimed ON darkroom.jobs USING btree (owner) WHERE (state = 1);
CREATE INDEX jobs_ended ON darkroom.jobs USING btree (ended_at) WHERE (state >= 2);
CREATE INDEX jobs_live ON darkroom.jobs USING btree (counted_as) WHERE (state < 2);
CREATE INDEX jobs_queued ON darkroom.jobs USING btree (goal, id) INCLUDE (model) WHERE (state = 0);
ALTER TABLE ONLY darkroom.job_inputs
    ADD CONSTRAINT job_inputs_digest_fkey FOREIGN KEY (digest) REFERENCES darkroom.inputs(digest);
ALTER TABLE ONLY darkroom.job_inputs
    ADD CONSTRAINT job_inputs_job_fkey FOREIGN KEY (job) REFERENCES darkroom.jobs(id) ON DELETE CASCADE;
