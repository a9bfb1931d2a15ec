BEGIN TRANSACTION;
CREATE TABLE inputs (
        digest TEXT PRIMARY KEY,
        bytes INTEGER NOT NULL,
        data BLOB NOT NULL
    );
INSERT INTO "inputs" VALUES('digest',9,X'612070696374757265');
CREATE TABLE job_inputs (
        job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
        digest TEXT NOT NULL REFERENCES inputs,
        PRIMARY KEY (job, digest)
    ) WITHOUT ROWID;
INSERT INTO "job_inputs" VALUES(1,'digest');
CREATE TABLE jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        caller TEXT NOT NULL,
        request_id TEXT NOT NULL,
        fingerprint BLOB NOT NULL,
        record BLOB NOT NULL,
        model TEXT NOT NULL,
        counted_as TEXT NOT NULL,
        detached INTEGER NOT NULL,
        goal REAL NOT NULL,
        accepted_at REAL NOT NULL,
        deadline REAL,
        state INTEGER NOT NULL,
        owner INTEGER,
        epoch INTEGER NOT NULL,
        losses INTEGER NOT NULL DEFAULT 0,
        ended_at REAL,
        failure TEXT, runtime TEXT,
        UNIQUE (caller, request_id)
    );
INSERT INTO "jobs" VALUES(1,'ada','waits',X'73616D65',X'7265636F7264206F66207761697473','demo','ada',0,1.79599048182586216925e+09,1.79599048082586216926e+09,NULL,0,NULL,1,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(2,'ada','runs',X'73616D65',X'7265636F7264206F662072756E73','demo','ada',0,1.7959904818297412395e+09,1.7959904808297412395e+09,NULL,1,1,1,0,NULL,NULL,'fast');
INSERT INTO "jobs" VALUES(3,'ada','done',X'73616D65',X'7265636F7264206F6620646F6E65','demo','ada',0,1.7959904818336515427e+09,1.79599048083365154266e+09,NULL,2,1,1,0,1795990480.83774,NULL,NULL);
CREATE TABLE servers (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        opened_at REAL NOT NULL,
        renewed_at REAL NOT NULL
    );
INSERT INTO "servers" VALUES(1,'old',1.79599048081417751307e+09,1.79599048081417751307e+09);
CREATE INDEX jobs_queued ON jobs (goal) WHERE state = 0;
CREATE INDEX jobs_claimed ON jobs (owner) WHERE state = 1;
CREATE INDEX jobs_live ON jobs (counted_as) WHERE state < 2;
CREATE INDEX jobs_ended ON jobs (ended_at) WHERE state >= 2;
CREATE INDEX job_inputs_digest ON job_inputs (digest);
CREATE TRIGGER last_job_of_input AFTER DELETE ON job_inputs
    WHEN NOT EXISTS (SELECT 1 FROM job_inputs WHERE digest = OLD.digest)
    BEGIN
        DELETE FROM inputs WHERE digest = OLD.digest;
    END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('servers',1);
INSERT INTO "sqlite_sequence" VALUES('jobs',3);
COMMIT;
