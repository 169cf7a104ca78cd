//! A line for each request.
//!
//! Written by hand: by way of `tracing`, which visits every field by itself, a line costs as much as half a request.

use std::time::Duration;

use portcullis_core::GrpcCode;

use super::Finished;
use crate::config::Log;
use crate::log::Line;

/// Writes the line, unless the file wants none, or it is one of many that succeeded.
pub(super) fn log(finished: &Finished, log: &Log) {
    let Some(path) = finished.asked.path.as_deref().filter(|_| log.access) else { return };
    let head = finished.head.as_ref();
    let refused = head.and_then(|head| head.refused);
    let succeeded = finished.whole && refused.is_none() && !finished.is_failure();
    if succeeded && log.sample.0 < 1.0 && fastrand::f64() >= log.sample.0 {
        return;
    }
    if !tracing::enabled!(target: "access", tracing::Level::INFO) {
        return;
    }
    let first = finished.attempts.first().map(|attempt| attempt.began);
    let last = finished.attempts.last().map(|attempt| &attempt.endpoint);
    let stages = finished.record.stages(first, head.map(|head| head.after), finished.took);
    let mut line = Line::new("INFO", "access");
    line.text("method", finished.asked.method.as_str());
    line.text("path", path);
    line.maybe("route", finished.route().map(|route| &**route));
    line.number("status", head.map(|head| head.status.as_u16().into()));
    line.number("grpc_status", finished.grpc.map(GrpcCode::number).map(u64::from));
    line.maybe("service", last.map(|endpoint| &**endpoint.service()));
    line.maybe("endpoint", last.map(|endpoint| &**endpoint.id()));
    line.number("attempts", last.map(|_| finished.attempts.len() as u64));
    line.maybe("refused_by", refused.map(|(layer, _)| layer));
    line.maybe("reason", refused.map(|(_, reason)| reason));
    let times = [
        ("auth_ms", stages.auth),
        ("limit_ms", stages.limit),
        ("discovery_ms", stages.discovery),
        ("balance_ms", stages.balance),
        ("upstream_ms", stages.upstream),
        ("head_ms", head.map(|head| head.after)),
        ("body_ms", stages.body),
        ("total_ms", Some(finished.took)),
    ];
    for (name, time) in times {
        line.millis(name, time);
    }
    line.number("bytes_in", Some(finished.record.uploaded()));
    line.number("bytes_out", Some(finished.down));
    line.flag("complete", finished.whole);
    line.display("peer", finished.asked.peer);
    line.display("trace", finished.record.trace);
    if let Some(trace) = finished.record.trace {
        line.display("span", Some(format_args!("{:016x}", trace.span)));
    }
    line.write();
}

impl Line {
    /// Three digits of a millisecond.
    fn millis(&mut self, name: &str, time: Option<Duration>) {
        if let Some(time) = time {
            let micros = time.as_nanos().saturating_add(500) / 1000;
            self.raw(name, format_args!("{}.{:03}", micros / 1000, micros % 1000));
        }
    }
}
